"""Grouped-query attention from its formula: keys and values are gathered for each query head."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention


def grouped_query_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, interleaved: bool = False, **options: Any
) -> Any:
    """Attention in which query head `h` reads KV head `h // G` or `h % Hkv`; see `longattn.dense`.

    Returns:
        As `longattn.reference.dense.attention`.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    head = np.arange(q.shape[-3])
    kv_heads = k.shape[-3]
    read = head % kv_heads if interleaved else head // (q.shape[-3] // kv_heads)
    return attention(q, k[..., read, :, :], v[..., read, :, :], **options)


def mha_to_gqa(wk: ArrayLike, wv: ArrayLike, n_kv: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Projections `[n_kv, D, E]` that are the means of consecutive heads of `[H, D, E]`."""
    means = []
    for w in (np.asarray(wk, np.float64), np.asarray(wv, np.float64)):
        group = len(w) // n_kv
        means.append(np.stack([w[n * group : (n + 1) * group].mean(axis=0) for n in range(n_kv)]))
    return means[0], means[1]
