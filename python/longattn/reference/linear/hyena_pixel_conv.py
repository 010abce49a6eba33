"""Hyena over maps and sequences from its formula, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.linear.convolution import depthwise, toeplitz, toeplitz2d

Float64 = NDArray[np.float64]


def hyena_pixel_conv(
    x: ArrayLike,
    w_in: ArrayLike,
    short: ArrayLike,
    kernel: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    w_out: ArrayLike | None = None,
    norm: Any = None,
    causal: bool = False,
) -> Float64:
    """Output `[B, H, W, Co]` or `[B, L, Co]`; see `longattn.linear.hyena_pixel_conv`."""
    x, w_in, short, kernel = (np.asarray(w, np.float64) for w in (x, w_in, short, kernel))
    if x.ndim == 4:
        centre: tuple[int, ...] = (short.shape[1] // 2, short.shape[2] // 2)
    else:
        centre = (short.shape[1] - 1 if causal else (short.shape[1] - 1) // 2,)
    q, k, v = np.split(depthwise(x @ w_in, short, centre), 3, axis=-1)
    gated = q * k
    if norm is not None:
        gated = gated - gated.mean(axis=-1, keepdims=True)
        gated = gated / np.sqrt((gated**2).mean(axis=-1, keepdims=True) + 1e-5) * np.asarray(norm[0]) + norm[1]
    if x.ndim == 4:
        y = toeplitz2d(gated, kernel)
    else:
        y = toeplitz(gated, kernel, zero=0 if causal else kernel.shape[1] // 2)
    if bias is not None:
        y = y + np.asarray(bias, np.float64) * gated
    result: Float64 = v * y
    return result if w_out is None else result @ np.asarray(w_out, np.float64)
