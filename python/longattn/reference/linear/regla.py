"""ReGLA, row after row."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.linear._recurrence import Float64, recurrence
from longattn.reference.linear.features import softmax


def regla(
    q: Any,
    k: Any,
    v: Any,
    gate: Any,
    refine: Any,
    *,
    gate_axis: str = "key",
    norm: str = "rms",
    gain: Any = None,
    shift: Any = None,
    eps: float = 0.0,
    initial_state: Any = None,
    log_scale: Any = None,
    **options: Any,
) -> tuple[Float64, Float64]:
    """See `longattn.linear`. `options` are bounds of sequences; states are of scale 1."""
    q, k, g, r = (np.asarray(x, np.float64) for x in (q, k, gate, refine))
    f = np.maximum((1 - r) * g**2 + r * (1 - (1 - g) ** 2), 1e-6)
    scale = 1 / (np.e * np.sqrt(q.shape[-1] * (np.e**2 - 1)))
    columns = False if gate_axis == "value" else None
    if log_scale is not None:
        if initial_state is not None:
            initial_state = np.exp(log_scale)[..., None, None] * np.asarray(initial_state, np.float64)
        log_scale[...] = 0
    o, state = recurrence(
        softmax(q), np.exp(k), v, g=np.log(f), columns=columns, scale=scale, initial_state=initial_state, **options
    )
    if norm != "none":
        if norm == "layer":
            o = o - o.mean(-1, keepdims=True)
        size = np.sqrt((o**2).mean(-1, keepdims=True) + eps)
        o = np.divide(o, size, out=np.zeros_like(o), where=size > 0)
        heads = o.shape[-3]
        if gain is not None:
            o = o * np.broadcast_to(gain, (heads, o.shape[-1]))[:, None]
        if shift is not None:
            o = o + np.broadcast_to(shift, (heads, o.shape[-1]))[:, None]
    return o, state
