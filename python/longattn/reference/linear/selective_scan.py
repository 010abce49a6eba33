"""The selective scan from its formula: one token after another, float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def selective_scan(
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
) -> tuple[Float64, Float64]:
    """Outputs `[B, L, E]` and states `[B, E, N]`; see `longattn.linear.selective_scan`."""
    x, dt, a, b, c = (np.asarray(w, np.float64) for w in (x, dt, a, b, c))
    batch, length, channels = x.shape
    steps = dt if dt_bias is None else dt + np.asarray(dt_bias, np.float64)
    if softplus:
        steps = np.logaddexp(0, steps)
    bounds = None if cu_seqlens is None else np.asarray(cu_seqlens)
    parts = [(s, 0, length) for s in range(batch)]
    if bounds is not None:
        parts = [(0, int(first), int(last)) for first, last in pairwise(bounds)]
    states = np.zeros((len(parts), channels, a.shape[1]))
    if initial_state is not None:
        states += np.asarray(initial_state, np.float64)
    y = np.zeros_like(x)
    for s, (entry, first, last) in enumerate(parts):
        for t in range(first, last):
            decay = np.exp(steps[entry, t, :, None] * a)
            states[s] = decay * states[s] + (steps[entry, t] * x[entry, t])[:, None] * b[entry, t]
            y[entry, t] = states[s] @ c[entry, t]
    if skip is not None:
        y += np.asarray(skip, np.float64) * x
    if z is not None:
        y *= silu(np.asarray(z, np.float64))
    return y, states


def sigmoid(x: Float64) -> Float64:
    """`1 / (1 + e^-x)`."""
    s: Float64 = 0.5 * (1 + np.tanh(0.5 * x))
    return s


def silu(x: Float64) -> Float64:
    """`x / (1 + e^-x)`."""
    y: Float64 = x * sigmoid(x)
    return y
