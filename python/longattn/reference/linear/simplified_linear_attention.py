"""Simplified linear attention from all pairs, and its normalisation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, convolved, divided, kept, pairs


def simplified_linear_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    pos: ArrayLike | None = None,
    eps: float = 1e-6,
    dwc_weight: ArrayLike | None = None,
    dwc_bias: ArrayLike | None = None,
    size: tuple[int, int] | None = None,
    mask: ArrayLike | None = None,
) -> Float64:
    """See `longattn.linear`."""
    keys = np.asarray(k, np.float64)
    if pos is not None:
        heads, length, dim = keys.shape[-3:]
        keys = keys + np.asarray(pos, np.float64).reshape(length, heads, dim).swapaxes(0, 1)
    qn, kn, vn = pairs(q, keys, v)
    weights = np.maximum(qn, 0) @ np.maximum(kn, 0).swapaxes(-1, -2)
    out = divided(weights * kept(mask, weights), eps) @ vn
    found: Float64 = out + (0 if dwc_weight is None else convolved(vn, dwc_weight, dwc_bias, size))
    return found


def rep_batch_norm(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike,
    beta: ArrayLike,
    *,
    alpha: float = 1.0,
    eps: float = 1e-5,
    blend: float = 0.0,
    layer_gamma: ArrayLike | None = None,
    layer_beta: ArrayLike | None = None,
) -> Float64:
    """See `longattn.linear`."""
    xn, mu, variance, factor, shift = (np.asarray(a, np.float64) for a in (x, mean, var, gamma, beta))
    batch = (xn - mu) / np.sqrt(variance + eps) * factor + shift + alpha * xn
    centred = xn - xn.mean(axis=-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    layer = layer * np.asarray(1 if layer_gamma is None else layer_gamma)
    layer = layer + np.asarray(0 if layer_beta is None else layer_beta)
    found: Float64 = blend * layer + (1 - blend) * batch
    return found
