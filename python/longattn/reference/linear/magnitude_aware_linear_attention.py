"""Magnitude-aware linear attention from all pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, features, kept, pairs


def rotated(x: Float64, angles: ArrayLike | None) -> Float64:
    """Pairs of neighbouring channels turned."""
    if angles is None:
        return x
    a = np.asarray(angles, np.float64)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = np.stack([even * np.cos(a) - odd * np.sin(a), even * np.sin(a) + odd * np.cos(a)], axis=-1)
    return turned.reshape(x.shape)


def magnitude_aware_linear_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    phi: Any = "elu1",
    scale: float | None = None,
    eps: float = 1e-6,
    angles: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Float64:
    """See `longattn.linear`."""
    s = np.asarray(q).shape[-1] ** -0.5 if scale is None else scale
    qn, kn, vn = pairs(features(q, phi), features(k, phi), v)
    plain = qn @ kn.swapaxes(-1, -2)
    here = kept(mask, plain)
    count = np.maximum(here.sum(axis=-1, keepdims=True), 1)
    mean = s * (plain * here).sum(axis=-1, keepdims=True) / count
    turned = rotated(qn, angles) @ rotated(kn, angles).swapaxes(-1, -2)
    weights = ((1 + 1 / (mean + eps)) * s * turned / count - mean / count) * here
    found: Float64 = weights @ vn
    return found
