"""Multi-head attention with projections from its formula, one head after another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.dense.attention import Float64, attention


def fixed_head_size_attention(
    x: ArrayLike,
    wq: ArrayLike,
    wk: ArrayLike,
    wv: ArrayLike,
    wo: ArrayLike,
    *,
    heads: int,
    context: ArrayLike | None = None,
    **options: Any,
) -> Float64:
    """Output `[B, L, Cout]` of a layer whose heads are `wq.shape[1] / heads` wide; see `longattn.dense`.

    Options that hold something per head are not among `options`.
    """
    x, wq, wk, wv, wo = (np.asarray(a, np.float64) for a in (x, wq, wk, wv, wo))
    source = x if context is None else np.asarray(context, np.float64)
    dim = wq.shape[1] // heads
    kv_heads = wk.shape[1] // dim
    value_dim = wv.shape[1] // kv_heads
    out: Float64 = np.zeros((*x.shape[:-1], wo.shape[1]))
    for h in range(heads):
        read = h // (heads // kv_heads)
        q = x @ wq[:, h * dim : (h + 1) * dim]
        k = source @ wk[:, read * dim : (read + 1) * dim]
        v = source @ wv[:, read * value_dim : (read + 1) * value_dim]
        one = attention(q[..., None, :, :], k[..., None, :, :], v[..., None, :, :], **options)
        out += one[..., 0, :, :] @ wo[h * value_dim : (h + 1) * value_dim]
    return out
