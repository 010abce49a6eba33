"""Attention over blocks of keys from its definition: dense attention with a mask, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.dense.attention import attention


def block_sparse_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    block_mask: Any,
    *,
    causal: bool = False,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """See `longattn.block_sparse_attention`; of sequences one after another, each by itself."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    *outer, heads, rows, _ = q.shape
    keys = k.shape[-2]
    size, first = block_mask.block_k, block_mask.first_q or block_mask.block_q
    mask = np.zeros((outer[0] if outer else 1, heads, rows, keys), bool)
    for b, h, i in np.ndindex(*mask.shape[:3]):
        own = block_mask.indptr[b % block_mask.indptr.shape[0], h * block_mask.indptr.shape[1] // heads]
        block = 0 if i < first else 1 + (i - first) // block_mask.block_q
        for j in block_mask.indices[own[block] : own[block + 1]]:
            mask[b, h, i, int(j) * size : (int(j) + 1) * size] = True
    mask = mask & np.asarray(options.pop("mask")) if "mask" in options else mask
    if not outer:
        mask = mask[0]
    given = {"causal": causal, **options}
    if cu_seqlens_q is None:
        return attention(q, k, v, mask=mask, return_lse=return_lse, **given)
    bounds_q = np.asarray(cu_seqlens_q)
    bounds_k = bounds_q if cu_seqlens_k is None else np.asarray(cu_seqlens_k)
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.full(q.shape[:-1], -np.inf)
    for s in range(len(bounds_q) - 1):
        r, c = slice(bounds_q[s], bounds_q[s + 1]), slice(bounds_k[s], bounds_k[s + 1])
        out[..., r, :], lse[..., r] = attention(
            q[..., r, :], k[..., c, :], v[..., c, :], mask=mask[..., r, c], return_lse=True, **given
        )
    return (out, lse) if return_lse else out
