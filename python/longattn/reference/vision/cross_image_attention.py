"""`cross_image_attention` and `masked_adain` from their formulas."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, softmax, wide


def cross_image_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, contrast: float = 1.67, scale: float | None = None
) -> Float64:
    """See `longattn.vision.cross_image_attention`."""
    a, b, c = wide(q), wide(k), wide(v)
    b, c = (np.repeat(x, a.shape[-3] // x.shape[-3], axis=-3) for x in (b, c))
    factor = a.shape[-1] ** -0.5 if scale is None else scale
    w = softmax(factor * (a @ b.swapaxes(-1, -2)))
    mean = w.mean(axis=-1, keepdims=True)
    out: Float64 = np.clip(mean + contrast * (w - mean), 0, 1) @ c
    return out


def masked_adain(
    x: ArrayLike, style: ArrayLike, mask: ArrayLike, style_mask: ArrayLike, *, eps: float = 1e-5
) -> Float64:
    """See `longattn.vision.masked_adain`."""
    out = wide(x).copy()
    for image, other, inside, of_other in zip(out, wide(style), np.asarray(mask), np.asarray(style_mask), strict=True):
        if not inside.any() or not of_other.any():
            continue
        rows, others = image[inside], other[of_other]
        normed = (rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + eps)
        image[inside] = normed * np.sqrt(others.var(axis=0) + eps) + others.mean(axis=0)
    return out
