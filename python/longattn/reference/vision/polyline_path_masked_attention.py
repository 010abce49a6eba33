"""`polyline_path_masked_attention` from its formula, path by path."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, softmax, wide


def path_masks(decay_x: ArrayLike, decay_y: ArrayLike) -> tuple[Float64, Float64]:
    """`M1` and `M2`, `[B, h, N, N]`, from decays `[B, H, W, h]`."""
    la, lb = (np.moveaxis(wide(x), -1, 1) for x in (decay_x, decay_y))
    b, h, height, width = la.shape

    def row(y: int, x1: int, x2: int) -> Float64:
        return np.asarray(la[:, :, y, min(x1, x2) + 1 : max(x1, x2) + 1].sum(axis=-1))

    def column(x: int, y1: int, y2: int) -> Float64:
        return np.asarray(lb[:, :, min(y1, y2) + 1 : max(y1, y2) + 1, x].sum(axis=-1))

    m1, m2 = np.zeros((2, b, h, height, width, height, width))
    for y1, x1, y2, x2 in np.ndindex(height, width, height, width):
        m1[:, :, y1, x1, y2, x2] = row(y1, x1, x2) + column(x2, y1, y2)
        m2[:, :, y1, x1, y2, x2] = column(x1, y1, y2) + row(y2, x1, x2)
    n = height * width
    return m1.reshape(b, h, n, n), m2.reshape(b, h, n, n)


def polyline_path_masked_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    decay_x: ArrayLike,
    decay_y: ArrayLike,
    *,
    combine: str = "logit_mean",
    scale: float | None = None,
) -> Float64:
    """See `longattn.vision.polyline_path_masked_attention`."""
    q, k, v = wide(q), wide(k), wide(v)
    b, h, height, width, dim = q.shape
    s = (dim**-0.5 if scale is None else scale) * (q.reshape(b, h, -1, dim) @ k.reshape(b, h, -1, dim).swapaxes(-1, -2))
    m1, m2 = path_masks(decay_x, decay_y)
    rows = v.reshape(b, h, height * width, -1)
    if combine == "logit_mean":
        out = 0.5 * (softmax(s + m1) + softmax(s + m2)) @ rows
    elif combine == "gate":
        out = softmax(s) * (np.exp(m1) + np.exp(m2)) @ rows
    else:
        y, x = np.divmod(np.arange(height * width), width)
        in_row, in_column = (y[:, None] == y[None]), (x[:, None] == x[None])
        aw = softmax(np.where(in_row, s + m1, -np.inf))
        ah = softmax(np.where(in_column, s + m1, -np.inf))
        out = 0.5 * (ah @ (aw @ rows) + aw @ (ah @ rows))
    return np.asarray(out).reshape(*q.shape[:4], -1)


def polyline_mask_apply(v: ArrayLike, decay_x: ArrayLike, decay_y: ArrayLike) -> Float64:
    """See `longattn.vision.polyline_mask_apply`."""
    a = wide(v)
    m1, _ = path_masks(decay_x, decay_y)
    return np.asarray(np.exp(m1) @ a.reshape(*a.shape[:2], -1, a.shape[-1])).reshape(a.shape)
