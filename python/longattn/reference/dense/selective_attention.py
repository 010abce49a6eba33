"""Selective attention from its formula: float64 numpy with materialised scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.dense.attention import attention


def selective_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    selector_head: int = 0,
    protect_first: int = 1,
    scale: float | None = None,
    softcap: float = 0.0,
    state: ArrayLike | None = None,
    return_state: bool = False,
    return_lse: bool = False,
) -> Any:
    """See `longattn.dense.selective_attention`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads, rows, dim = q.shape[-3:]
    kv_heads, keys = k.shape[-3:-1]
    head = k[..., selector_head // (heads // kv_heads), :, :]
    a = (dim**-0.5 if scale is None else scale) * (q[..., selector_head, :, :] @ head.swapaxes(-1, -2))
    if softcap:
        a = softcap * np.tanh(a / softcap)
    position = (np.arange(rows) + keys - rows)[:, None]
    j = np.arange(keys)
    s = np.where((j < position) & (j >= protect_first), np.maximum(a, 0.0), 0.0)
    before = np.zeros((*s.shape[:-2], 1, keys))
    if state is not None:
        before[..., 0, : keys - rows] = state
    f = before + np.cumsum(s, axis=-2)  # after each row
    lowered = np.concatenate([before, f[..., :-1, :]], axis=-2) if rows else f
    out, lse = attention(
        q, k, v, causal=True, scale=scale, softcap=softcap, bias=-lowered[..., None, :, :], return_lse=True
    )
    last = f[..., -1, :] if rows else before[..., 0, :]
    extra = ([lse] if return_lse else []) + ([last] if return_state else [])
    return (out, *extra) if extra else out
