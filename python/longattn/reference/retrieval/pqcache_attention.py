"""PQCache, given its codes. Nothing is checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.retrieval.product_quantisation import ProductAttention, ProductCodes, product_attention


def pqcache_attention(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    codes: Sequence[ProductCodes],
    *,
    retrieved: float = 0.1,
    sinks: int = 4,
    window: int = 64,
    scale: float | None = None,
) -> ProductAttention:
    """Attention to sinks, window, rows without a code and the rows of the largest estimated logits.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        values: `[Hkv, N, Dv]`.
        codes: of each KV head.
        retrieved: share of the rows that is read by their codes.
        sinks: first rows, always read.
        window: last rows, always read.
        scale: factor of the logits; `None` is `D ** -0.5`.

    References:
        H. Zhang et al., "PQCache: Product Quantization-based KVCache for Long Context LLM Inference", 2024.
    """
    rows = max(1, int(np.ceil(retrieved * np.shape(keys)[1])))
    return product_attention(q, keys, values, codes, top_k=rows, sinks=sinks, window=window, scale=scale, rest=False)
