"""Attention over listed keys from its definition: dense attention with a mask and a bias, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.dense.attention import attention


def index_sparse_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    lists: Any,
    *,
    causal: bool = False,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """See `longattn.index_sparse_attention`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    *outer, heads, rows, _ = q.shape
    first = lists.first_q or lists.block_q
    bias = np.full((outer[0] if outer else 1, heads, rows, k.shape[-2]), -np.inf)
    for b, h, i in np.ndindex(*bias.shape[:3]):
        own = lists.indptr[b % lists.indptr.shape[0], h * lists.indptr.shape[1] // heads]
        block = 0 if i < first else 1 + (i - first) // lists.block_q
        for n in range(own[block], own[block + 1]):
            bias[b, h, i, lists.indices[n]] = 0.0 if lists.bias is None else lists.bias[n]
    bias = bias + np.asarray(options.pop("bias"), np.float64) if "bias" in options else bias
    mask = bias > -np.inf
    if "mask" in options:
        mask = mask & np.asarray(options.pop("mask"))
    bias = np.where(mask, bias, 0.0)
    if not outer:
        mask, bias = mask[0], bias[0]
    return attention(q, k, v, causal=causal, mask=mask, bias=bias, return_lse=return_lse, **options)
