"""`cascaded_group_attention` from its formula, window by window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, depthwise, flat, linear, offset_bias, padded, wide


def cascaded_group_attention(
    x: ArrayLike,
    wqkv: Sequence[Any],
    kernels: Sequence[Any],
    wo: Any,
    *,
    key_dim: int,
    tables: ArrayLike | None = None,
    window: int | None = None,
    cascade: bool = True,
) -> Float64:
    """See `longattn.vision.cascaded_group_attention`."""
    a = wide(x)
    _, height, width, channels = a.shape
    h, size = len(wqkv), channels // len(wqkv)
    shape = (height, width) if window is None or window >= max(height, width) else (window, window)
    a = padded(a, shape)
    out = np.zeros((*a.shape[:3], linear(np.zeros((1, sum(_width(w, key_dim) for w in wqkv))), wo).shape[-1]))
    for top in range(0, a.shape[1], shape[0]):
        for left in range(0, a.shape[2], shape[1]):
            part = a[:, top : top + shape[0], left : left + shape[1]]
            found: list[Float64] = []
            for n in range(h):
                f = part[..., n * size : (n + 1) * size]
                if cascade and found:
                    f = f + found[-1]
                qkv = linear(f, wqkv[n])
                kernel, bias = kernels[n] if isinstance(kernels[n], tuple | list) else (kernels[n], 0.0)
                q = depthwise(qkv[..., :key_dim], kernel) + bias
                k, v = qkv[..., key_dim : 2 * key_dim], qkv[..., 2 * key_dim :]
                added = 0.0 if tables is None else offset_bias(tables, shape)[n]
                found.append(attend(flat(q), flat(k), flat(v), 1, None, added).reshape(*part.shape[:3], -1))
            y = linear(np.maximum(np.concatenate(found, axis=-1), 0), wo)
            out[:, top : top + shape[0], left : left + shape[1]] = y
    return out[:, :height, :width]


def _width(w: Any, key_dim: int) -> int:
    return int(np.shape(w[0] if isinstance(w, tuple | list) else w)[1]) - 2 * key_dim
