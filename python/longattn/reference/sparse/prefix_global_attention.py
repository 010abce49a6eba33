"""A prefix of global tokens and windows: dense attention with a mask and a bias, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.dense.attention import attention


def prefix_global_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    prefix: Any,
    radius: int = 127,
    causal: bool = False,
    relative_bias: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.prefix_global_attention`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batched = q.ndim == 4
    if not batched:
        q, k, v = q[None], k[None], v[None]
    batch, _, rows, _ = q.shape
    tokens = np.full(batch, rows) if lengths is None else np.asarray(lengths)
    at = np.arange(rows)
    d = at - at[:, None]
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    for b, first in enumerate(np.broadcast_to(prefix, batch)):
        n = tokens[b]
        mask = (np.abs(d) <= radius) | (at < first) | (at < first)[:, None]
        if causal:
            mask &= d <= 0
        bias: Any = 0.0
        if relative_bias is not None:
            table = np.asarray(relative_bias, np.float64)
            bias = table[:, np.clip(table.shape[1] // 2 + d, 0, table.shape[1] - 1)][:, :n, :n]
        parts = (x[b][:, :n] for x in (q, k, v))
        out[b, :, :n], lse[b, :, :n] = attention(*parts, mask=mask[:n, :n], bias=bias, scale=scale, return_lse=True)
    if not batched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out
