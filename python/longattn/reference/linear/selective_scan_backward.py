"""Gradients of the selective scan: the adjoint recurrence, token after token in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.linear.selective_scan import sigmoid, silu

Float64 = NDArray[np.float64]


def selective_scan_backward(
    d_out: ArrayLike,
    d_state: ArrayLike | None,
    x: ArrayLike,
    dt: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    c: ArrayLike,
    *,
    skip: ArrayLike | None = None,
    dt_bias: ArrayLike | None = None,
    softplus: bool = False,
    z: ArrayLike | None = None,
    initial_state: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
) -> dict[str, Float64]:
    """Gradients by the names of the arguments; see `longattn.linear.selective_scan_backward`.

    With `D` the gradient of `h_t = e h_(t-1) + dt b x`, `e = exp(dt a)`, and `dy` that of the output before its gate:

        D += c dy        dc = h_t dy        db = D dt x        dx = dt D b (+ skip dy)
        ddt = D (a e h_(t-1) + b x)         da = D dt e h_(t-1)          D of h_(t-1) = e D
    """
    x, dt, a, b, c, d = (np.asarray(w, np.float64) for w in (x, dt, a, b, c, d_out))
    batch, length, channels = x.shape
    raw = dt if dt_bias is None else dt + np.asarray(dt_bias, np.float64)
    steps = np.logaddexp(0, raw) if softplus else raw
    weights = np.zeros(channels) if skip is None else np.asarray(skip, np.float64)
    parts = [(s, 0, length) for s in range(batch)]
    if cu_seqlens is not None:
        parts = [(0, int(first), int(last)) for first, last in pairwise(np.asarray(cu_seqlens))]
    first = np.zeros((len(parts), channels, a.shape[1]))
    if initial_state is not None:
        first = first + np.asarray(initial_state, np.float64)
    dx, d_steps, da = np.zeros(x.shape), np.zeros(x.shape), np.zeros(a.shape)
    db, dc, dz, d_skip = np.zeros(b.shape), np.zeros(c.shape), np.zeros(x.shape), np.zeros(channels)
    d_first = np.zeros(first.shape)
    for s, (entry, start, end) in enumerate(parts):
        states = [first[s]]
        for t in range(start, end):
            decay = np.exp(steps[entry, t, :, None] * a)
            states.append(decay * states[-1] + (steps[entry, t] * x[entry, t])[:, None] * b[entry, t])
        back = np.zeros(first.shape[1:]) if d_state is None else np.asarray(d_state, np.float64)[s].copy()
        for t in reversed(range(start, end)):
            step, own, after = steps[entry, t], x[entry, t], states[t - start + 1]
            dy = d[entry, t]
            if z is not None:
                gate = np.asarray(z, np.float64)[entry, t]
                open_ = sigmoid(gate)
                dz[entry, t] = dy * (after @ c[entry, t] + weights * own) * open_ * (1 + gate * (1 - open_))
                dy = dy * silu(gate)
            back += np.outer(dy, c[entry, t])
            dc[entry, t] = dy @ after
            db[entry, t] = (step * own) @ back
            left = np.exp(step[:, None] * a) * states[t - start]
            written = back @ b[entry, t]
            dx[entry, t] = step * written + weights * dy
            d_steps[entry, t] = (back * a * left).sum(-1) + own * written
            da += back * step[:, None] * left
            d_skip += dy * own
            back *= np.exp(step[:, None] * a)
        d_first[s] = back
    d_dt = d_steps * sigmoid(raw) if softplus else d_steps
    found = {"x": dx, "dt": d_dt, "a": da, "b": db, "c": dc, "skip": d_skip, "dt_bias": d_dt.sum((0, 1)), "z": dz}
    return {**found, "initial_state": d_first}
