"""`deformable_kv_attention_2d` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import (
    Float64,
    attend,
    depthwise,
    flat,
    gelu,
    layer_norm,
    linear,
    places,
    sample,
    wide,
)


def offset_positions(
    features: Float64, kernel: ArrayLike, weights: ArrayLike, norm: Any, stride: int, factor: float, reference: str
) -> Float64:
    """Coordinates of the sampling points, `[B, points, n]`."""
    k = np.shape(kernel)[0]
    h = depthwise(features, kernel, stride, 0 if k == stride else k // 2)
    h = h if norm is None else layer_norm(h, *norm)
    offset = flat(gelu(h)) @ wide(weights)
    n = np.array(h.shape[1:-1])
    i = places(n)
    spread = np.maximum(n - 1, 1)
    ref = {
        "code": 2 * (i + 0.5) / spread - 1,
        "symmetric": 2 * (i + 0.5) / n - 1,
        "corners": 2 * i / spread - 1,
    }[reference]
    ref = np.where(n == 1, 0.0, ref)
    if factor >= 0:
        return np.asarray(ref + np.tanh(offset) * factor / spread)
    return np.asarray(np.clip(ref + offset, -1, 1))


def deformable_kv_attention_2d(
    x: ArrayLike,
    wq: Any,
    wk: Any,
    wv: Any,
    *,
    heads: int,
    offset_kernel: ArrayLike | None = None,
    offset_weights: ArrayLike | None = None,
    offset_norm: Any = None,
    groups: int = 1,
    stride: int = 1,
    range_factor: float = 2.0,
    reference: str = "code",
    bias_table: ArrayLike | None = None,
    bias_layers: Any = None,
    no_offset: bool = False,
    wo: Any = None,
) -> Float64:
    """See `longattn.vision.deformable_kv_attention_2d`."""
    a = wide(x)
    b, height, width, c = a.shape
    q = linear(a, wq)
    biases = []
    if no_offset:
        r = stride
        cut = a[:, : height // r * r, : width // r * r]
        samples = flat(cut.reshape(b, height // r, r, width // r, r, c).mean(axis=(2, 4)))
    else:
        parts = []
        for g in range(groups):
            own = slice(g * c // groups, (g + 1) * c // groups)
            assert offset_kernel is not None and offset_weights is not None
            at = offset_positions(
                q[..., own], offset_kernel, offset_weights, offset_norm, stride, range_factor, reference
            )
            parts.append(sample(a[..., own], at))
            size = np.array([height, width])
            grid = np.where(size == 1, 0.0, 2 * places(size) / np.maximum(size - 1, 1) - 1)
            if bias_layers is not None:
                d = 4 * (grid[None, :, None] - at[:, None])
                hidden = linear(np.sign(d) * np.log(np.abs(d) + 1) / np.log(8), bias_layers[0])
                biases.append(np.moveaxis(linear(np.maximum(hidden, 0), bias_layers[1]), -1, 1))
            if bias_table is not None:
                t = wide(bias_table)[g * heads // groups : (g + 1) * heads // groups]
                values = sample(np.moveaxis(t, 0, -1)[None], 0.5 * (grid[None, :, None] - at[:, None]))
                biases.append(np.moveaxis(values, -1, 1))
        samples = np.concatenate(parts, axis=-1)
    bias: Any = np.concatenate(biases, axis=1) if biases else 0.0
    out = attend(flat(q), linear(samples, wk), linear(samples, wv), heads, None, bias)
    return linear(out.reshape(b, height, width, -1), wo)
