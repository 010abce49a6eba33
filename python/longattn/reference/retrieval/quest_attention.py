"""Quest. Nothing is checked."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.retrieval.units import UnitAttention, page_rows, unit_attention


def quest_attention(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    page_size: int,
    *,
    token_budget: int = 1024,
    sinks: int = 0,
    window: int = 16,
    scale: float | None = None,
) -> UnitAttention:
    """Attention to sinks, window, the unfinished page and the pages of the largest bounds.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        values: `[Hkv, N, Dv]`.
        page_size: rows of a page.
        token_budget: rows of the pages that are read.
        sinks: first rows, always read.
        window: last rows, always read.
        scale: factor of the logits; `None` is `D ** -0.5`.

    References:
        J. Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024.
    """
    kv_heads, length, _ = np.shape(keys)
    pages = page_rows(length // page_size * page_size, page_size)
    return unit_attention(
        q,
        keys,
        values,
        [pages] * kv_heads,
        top_k=max(token_budget // page_size, 1) * page_size,
        score="bounds",
        sinks=sinks,
        window=window,
        scale=scale,
        rest=False,
    )
