"""Convolutions from their formulas: every tap of every output, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def depthwise(x: ArrayLike, weight: ArrayLike, centre: tuple[int, ...], bias: ArrayLike | None = None) -> Float64:
    """`y[i] = sum_t weight[:, t] * x[i + t - centre]` over one axis of `[B, L, C]` or two of `[B, H, W, C]`."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    size, taps = x.shape[1:-1], weight.shape[1:]
    y: Float64 = np.zeros_like(x) if bias is None else np.zeros_like(x) + np.asarray(bias, np.float64)
    for place in np.ndindex(*size):
        for tap in np.ndindex(*taps):
            source = tuple(i + t - c for i, t, c in zip(place, tap, centre, strict=True))
            if all(0 <= j < n for j, n in zip(source, size, strict=True)):
                y[:, *place] += weight[:, *tap] * x[:, *source]
    return y


def toeplitz(x: ArrayLike, kernel: ArrayLike, *, zero: int = 0, rows: int | None = None) -> Float64:
    """`y[i] = sum_j kernel[i - j + zero] * x[j]` for `[B, L, C]` or `[B, H, L, D]`; see `longattn.linear.toeplitz`."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    length = x.shape[-2]
    at = np.arange(length if rows is None else rows)[:, None] - np.arange(length) + zero
    inside = (at >= 0) & (at < kernel.shape[1])
    matrix = np.where(inside, kernel[:, np.clip(at, 0, kernel.shape[1] - 1)], 0.0)
    y: Float64 = np.einsum("cij,bjc->bic" if x.ndim == 3 else "hij,bhjc->bhic", matrix, x)
    return y


def toeplitz2d(x: ArrayLike, kernel: ArrayLike, *, centre: tuple[int, int] | None = None) -> Float64:
    """True convolution of a map; see `longattn.linear.toeplitz2d`."""
    kernel = np.asarray(kernel, np.float64)
    high, wide = kernel.shape[1:]
    up, left = (high // 2, wide // 2) if centre is None else centre
    return depthwise(x, kernel[:, ::-1, ::-1], (high - 1 - up, wide - 1 - left))


def dynamic_conv(v: ArrayLike, w: ArrayLike, *, softmax: bool = False, causal: bool = False) -> Float64:
    """`y[i] = sum_t w[i, t] * v[i + t - centre]`; see `longattn.linear.dynamic_conv`."""
    v = np.asarray(v, np.float64)
    weights: Float64 = np.asarray(w, np.float64)
    taps, length = weights.shape[3], v.shape[2]
    if softmax:
        e = np.exp(weights - weights.max(axis=-1, keepdims=True))
        weights = e / e.sum(axis=-1, keepdims=True)
    y = np.zeros_like(v)
    for i in range(length):
        for t in range(taps):
            j = i + t - (taps - 1 if causal else (taps - 1) // 2)
            if 0 <= j < length:
                y[:, :, i] += weights[:, :, i, t, None] * v[:, :, j]
    return y


def diagonal_scan(x: ArrayLike, decay: ArrayLike, b: ArrayLike, c: ArrayLike) -> Float64:
    """`h = decay * h + b * x`, `y = Re(sum_n c * h)` for `[B, L, C]`; see `longattn.linear.diagonal_scan`."""
    x, decay, b, c = np.asarray(x, np.float64), np.asarray(decay), np.asarray(b), np.asarray(c)
    kind = np.result_type(np.float64, decay, b, c)
    state = np.zeros((len(x), *decay.shape), kind)
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        state = decay * state + b * x[:, t, :, None]
        y[:, t] = (c * state).sum(axis=-1).real
    return y
