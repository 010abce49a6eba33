"""Mega's moving averages and gated attention from their formulas, float64."""

from __future__ import annotations

from math import erf
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.linear.selective_scan import sigmoid, silu

Float64 = NDArray[np.float64]


def multi_dim_damped_ema(
    x: ArrayLike,
    alpha: ArrayLike,
    delta: ArrayLike,
    beta: ArrayLike,
    gamma: ArrayLike,
    *,
    omega: ArrayLike | None = None,
    silu: bool = False,
    backward: Any = None,
    initial_state: ArrayLike | None = None,
) -> tuple[Float64, Float64]:
    """Outputs `[B, L, C]` and states `[B, C, N]`; see `longattn.linear.multi_dim_damped_ema`."""
    x, alpha, delta, beta, gamma = (np.asarray(w, np.float64) for w in (x, alpha, delta, beta, gamma))
    p, d = sigmoid(alpha), sigmoid(delta)
    state = np.zeros((len(x), *alpha.shape)) if initial_state is None else np.array(initial_state, np.float64)
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        state = (1 - p * d) * state + p * beta * x[:, t, :, None]
        y[:, t] = alpha.shape[1] ** -0.5 * (gamma * state).sum(axis=-1)
    if backward is not None:
        weights = kernel(backward[0], backward[1], backward[2], backward[3], x.shape[1])
        for t in range(x.shape[1]):
            for j in range(t + 1, x.shape[1]):
                y[:, t] += weights[:, j - t] * x[:, j]
    if omega is not None:
        y = y + np.asarray(omega, np.float64) * x
    return (_silu(y) if silu else y), state


def _silu(y: Float64) -> Float64:
    return silu(y)


def kernel(alpha: ArrayLike, delta: ArrayLike, beta: ArrayLike, gamma: ArrayLike, length: int) -> Float64:
    """Weights `[C, L]` by the number of tokens in between."""
    alpha, delta, beta, gamma = (np.asarray(w, np.float64) for w in (alpha, delta, beta, gamma))
    p, d = sigmoid(alpha), sigmoid(delta)
    powers = (1 - p * d)[..., None] ** np.arange(length)
    weights: Float64 = alpha.shape[1] ** -0.5 * ((gamma * p * beta)[..., None] * powers).sum(axis=1)
    return weights


def mega_gated_attention(
    x: ArrayLike,
    weights: Any,
    *,
    residual: ArrayLike | None = None,
    function: str = "softmax",
    relative_bias: ArrayLike | None = None,
    chunk: int | None = None,
    causal: bool = True,
) -> Float64:
    """Output `[B, L, C]`; see `longattn.linear.mega_gated_attention`."""
    x = np.asarray(x, np.float64)
    names = ("omega", "w_v", "w_m", "b_m", "gamma_q", "beta_q", "gamma_k", "beta_k", "w_h")
    omega, w_v, w_m, b_m, gamma_q, beta_q, gamma_k, beta_k, w_h = (
        np.asarray(getattr(weights, name), np.float64) for name in names
    )
    kept = x if residual is None else np.asarray(residual, np.float64)
    channels, dim, length = x.shape[2], len(gamma_q), x.shape[1]
    averages, _ = multi_dim_damped_ema(x, *weights.ema, omega=omega, silu=True, backward=weights.ema_backward)
    v = silu(x @ w_v)
    u, z, r, hx = np.split(averages @ w_m + b_m, np.cumsum([channels, dim, w_v.shape[1]]), axis=2)
    u, z, r = sigmoid(u), silu(z), silu(r)
    q, k = z * gamma_q + beta_q, z * gamma_k + beta_k
    out = np.zeros_like(v)
    size = length if chunk is None else chunk
    for i in range(length):
        first = i // size * size
        last = i + 1 if causal else min(first + size, length)
        s = np.einsum("bd,bjd->bj", q[:, i], k[:, first:last])
        s = s * dim**-0.5 if function == "softmax" else s / (last - first)
        if relative_bias is not None:
            table = np.asarray(relative_bias, np.float64)
            s = s + table[np.arange(first, last) - i + len(table) // 2]
        out[:, i] = np.einsum("bj,bjd->bd", weigh(s, function), v[:, first:last])
    h = silu(hx + (out * r) @ w_h)
    result: Float64 = kept + u * (h - kept)
    return result


def weigh(s: Float64, function: str) -> Float64:
    """Weights of the keys of a row."""
    if function == "softmax":
        e = np.exp(s - s.max(axis=-1, keepdims=True))
        weights: Float64 = e / e.sum(axis=-1, keepdims=True)
        return weights
    if function == "relu2":
        return np.maximum(s, 0.0) ** 2
    mean, deviation = np.sqrt(0.5), np.sqrt(0.25 / np.pi)
    each: Float64 = np.vectorize(lambda t: 0.5 * (1 + erf((t - mean) / (deviation * np.sqrt(2)))))(s)
    return each
