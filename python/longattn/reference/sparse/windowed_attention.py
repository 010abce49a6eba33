"""Windows by head and query from their definition: dense attention with a mask, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention


def windowed_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    radius: Any,
    centre: ArrayLike | None = None,
    causal: bool = False,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    softcap: float = 0.0,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.windowed_attention`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    *outer, heads, rows, _ = q.shape
    keys = k.shape[-2]
    batch = outer[0] if outer else 1
    by_head = np.ndim(radius) == 1 and not isinstance(radius, tuple)
    sides = np.broadcast_to(np.reshape(radius, (-1, 1)) if by_head else np.asarray(radius), (heads, 2))
    bounds_q = [0, rows] if cu_seqlens_q is None else list(np.asarray(cu_seqlens_q))
    bounds_k = [0, keys] if cu_seqlens_q is None else list(np.asarray(cu_seqlens_q))
    if cu_seqlens_k is not None:
        bounds_k = list(np.asarray(cu_seqlens_k))
    mask: NDArray[np.bool_] = np.zeros((batch, heads, rows, keys), bool)
    for s in range(len(bounds_q) - 1):
        own, seen = slice(bounds_q[s], bounds_q[s + 1]), np.arange(bounds_k[s + 1] - bounds_k[s])
        position = np.arange(bounds_q[s + 1] - bounds_q[s])[:, None]
        position = position + len(seen) - len(position)
        centres = np.broadcast_to(position[:, 0], (batch, heads, len(position)))
        if centre is not None:
            centres = np.broadcast_to(np.asarray(centre), (batch, heads, rows))[..., own]
        offset = seen - centres[..., None]
        near = (offset >= -sides[:, 0, None, None]) & (offset <= sides[:, 1, None, None])
        mask[..., own, bounds_k[s] : bounds_k[s + 1]] = near & (seen <= position) if causal else near
    if not outer:
        mask = mask[0]
    return attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, return_lse=return_lse)
