"""DiffuSSM's mixer from its formula, by the recurrence, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.linear.selective_scan import sigmoid, silu

Float64 = NDArray[np.float64]


def bidirectional_gated_ssm(
    x: ArrayLike,
    forward: Any,
    backward: Any,
    w_y: ArrayLike,
    w_g: ArrayLike,
    w_o: ArrayLike,
    *,
    activation: str = "silu",
) -> Float64:
    """Output `[B, L, Co]`; see `longattn.linear.bidirectional_gated_ssm`."""
    x, w_y, w_g, w_o = (np.asarray(w, np.float64) for w in (x, w_y, w_g, w_o))
    both = np.concatenate([ssm(x, forward), ssm(x[:, ::-1], backward)[:, ::-1]], axis=-1)
    gate = x @ w_g
    if activation != "none":
        gate = silu(gate) if activation == "silu" else sigmoid(gate)
    result: Float64 = (both @ w_y * gate) @ w_o
    return result


def ssm(x: Float64, model: Any) -> Float64:
    """One model over `[B, L, C]`."""
    a, b, c = (np.asarray(w, np.complex128) for w in (model.a, model.b, model.c))
    decay = np.exp(np.asarray(model.dt, np.float64)[:, None] * a)
    state = np.zeros((len(x), *a.shape), np.complex128)
    y = np.asarray(model.skip, np.float64) * x
    for t in range(x.shape[1]):
        state = decay * state + (decay - 1) / a * b * x[:, t, :, None]
        y[:, t] += 2 * (c * state).sum(axis=-1).real
    return y


def kernel(model: Any, length: int) -> Float64:
    """The model's impulse response `[C, L]`, without what is skipped."""
    a, b, c = (np.asarray(w, np.complex128) for w in (model.a, model.b, model.c))
    z = np.asarray(model.dt, np.float64)[:, None] * a
    powers = np.exp(z[..., None] * np.arange(length))
    response: Float64 = 2 * ((c * (np.exp(z) - 1) / a * b)[..., None] * powers).sum(axis=1).real
    return response
