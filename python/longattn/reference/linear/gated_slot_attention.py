"""Gated slot attention: slots built row by row, and a softmax over them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from longattn.reference.linear.features import Float64, softmax


def gated_slot_attention(
    q: Any, k: Any, v: Any, g: Any, *, scale: Any = None, initial_state: Any = None, cu_seqlens: Any = None
) -> tuple[Float64, tuple[Float64, Float64]]:
    """See `longattn.linear`."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    one = q.ndim == 3
    if one:
        q, k, v, g = q[None], k[None], v[None], g[None]
    batch, heads, length, dim = k.shape
    factor = dim**-0.5 if scale is None else scale
    group = q.shape[1] // heads
    sequences = [(b, 0, length) for b in range(batch)]
    if cu_seqlens is not None:
        sequences = [(0, int(a), int(z)) for a, z in pairwise(np.asarray(cu_seqlens))]
    keys = np.zeros((len(sequences), heads, dim, g.shape[-1]))
    values = np.zeros((len(sequences), heads, g.shape[-1], v.shape[-1]))
    if initial_state is not None:
        keys, values = (
            np.array(x, np.float64).reshape(y.shape) for x, y in zip(initial_state, (keys, values), strict=True)
        )
    out = np.zeros((batch, q.shape[1], length, v.shape[-1]))
    for n, (b, start, end) in enumerate(sequences):
        for t in range(start, end):
            with np.errstate(under="ignore"):
                gate = np.exp(g[b, :, t])
            keys[n] = keys[n] * gate[:, None, :] + k[b, :, t, :, None] * (1 - gate)[:, None, :]
            values[n] = values[n] * gate[:, :, None] + (1 - gate)[:, :, None] * v[b, :, t, None, :]
            for h in range(q.shape[1]):
                weights = softmax(factor * (q[b, h, t] @ keys[n, h // group]))
                out[b, h, t] = weights @ values[n, h // group]
    if one and cu_seqlens is None:
        keys, values = keys[0], values[0]
    return (out[0] if one else out), (keys, values)
