"""`layer_and_channel_spatial_attention` and `channel_spatial_gate` from their formulas."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, depthwise, softmax, wide


def layer_and_channel_spatial_attention(x: ArrayLike, *, gamma: float = 1.0, sign: int = -1) -> Float64:
    """See `longattn.vision.layer_and_channel_spatial_attention`."""
    a = wide(x)
    rows = a.reshape(*a.shape[:2], -1)
    return np.asarray(a + gamma * (softmax(sign * rows @ rows.swapaxes(1, 2)) @ rows).reshape(a.shape))


def channel_spatial_gate(x: ArrayLike, kernel: ArrayLike, *, bias: float = 0.0, gamma: float = 1.0) -> Float64:
    """See `longattn.vision.channel_spatial_gate`."""
    a = wide(x)
    volume = depthwise(a[..., None], wide(kernel)[..., None])[..., 0]
    return np.asarray(a + gamma * a / (1 + np.exp(-(volume + bias))))
