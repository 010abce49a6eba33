"""HATA's attention over plain hash codes: float64 numpy. Nothing is checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.retrieval.retrieval_attention import attention, candidates

Float64 = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class HashAttention:
    """Output `[Hq, Lq, Dv]`, lse `[Hq, Lq]` and selected rows `[Hkv][Lq]` of `hata_topk_attention`."""

    out: Float64
    lse: Float64
    selected: list[list[Rows]]


def hata_topk_attention(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    weights: ArrayLike,
    use_norm: bool = False,
    coded: int | None = None,
    *,
    top_k: int | float = 0.0156,
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
) -> HashAttention:
    """Attention over the keys whose hash codes are nearest to those of the query group.

    Bit t of a vector x is `(x W)_t > 0`. A KV head ranks its keys by the sum of the Hamming distances to the
    codes of its query heads, or with `use_norm` by `(1 - 2 distance / code_bits)`, summed over the heads, times
    the norm of the key as float16. Ties go to the lower row.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        values: `[Hkv, N, Dv]`.
        weights: W, `[Hkv, D, code_bits]`.
        use_norm: rank by the estimated cosine times the norm.
        coded: rows that have a code, others are always read; default all.
        top_k: rows selected per KV head, beside sinks and window, or the share of all rows that they are.
        sinks: first rows, always read.
        window: last rows, always read.
        scale: factor of the logits; `None` is `D ** -0.5`.

    References:
        P. Gong et al., "HATA: Trainable and Hardware-Efficient Hash-Aware Top-k Attention for Scalable Large Model
        Inference", 2025.
    """
    q, keys, values, weights = (np.asarray(x, np.float64) for x in (q, keys, values, weights))
    heads, rows, _ = q.shape
    kv_heads, length, _ = keys.shape
    group, code_bits = heads // kv_heads, weights.shape[-1]
    coded = length if coded is None else coded
    top_k = math.ceil(top_k * length) if isinstance(top_k, float) else top_k
    selected: list[list[Rows]] = []
    for h in range(kv_heads):
        key_bits = keys[h] @ weights[h] > 0
        norms = np.minimum(np.linalg.norm(keys[h], axis=-1), 65504).astype(np.float16).astype(np.float64)
        of_head = []
        for i in range(rows):
            query_bits = q[h * group : (h + 1) * group, i] @ weights[h] > 0
            distance = (query_bits[:, None] != key_bits[None]).sum(axis=-1).sum(axis=0)
            score = (group * code_bits - 2 * distance) * norms if use_norm else -distance
            among = candidates(length - rows + i + 1, coded, sinks, window)
            best = among[np.argsort(-score[among], kind="stable")][:top_k]
            of_head.append(np.sort(best))
        selected.append(of_head)
    exact = attention(q, keys, values, selected, coded, sinks=sinks, window=window, scale=scale)
    return HashAttention(exact.out, exact.lse, selected)
