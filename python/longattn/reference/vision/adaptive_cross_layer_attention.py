"""`adaptive_cross_layer_attention` from its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, depthwise, linear, places, sample, softmax, wide


def adaptive_cross_layer_attention(
    x: ArrayLike,
    layers: Sequence[ArrayLike],
    w_ref: Any,
    offsets: Any,
    weights: Any,
    kernel: ArrayLike,
    *,
    shift: ArrayLike | None = None,
    kept: ArrayLike | None = None,
) -> Float64:
    """See `longattn.vision.adaptive_cross_layer_attention`."""
    a = wide(x)
    b, h, w, c = a.shape
    shares = softmax(np.where(True if kept is None else np.asarray(kept), linear(a, weights), -np.inf))
    k = shares.shape[-1] // len(layers)
    at = linear(a, offsets).reshape(b, h, w, len(layers), k, 2) + places((h, w)).reshape(1, h, w, 1, 1, 2)
    total = np.zeros(a.shape)
    for n, layer in enumerate(layers):
        found = sample(linear(layer, w_ref), at[:, :, :, n], coordinates="pixel")
        total += np.einsum("bhwk,bhwkc->bhwc", shares[..., n * k : (n + 1) * k], found)
    out = depthwise(total, kernel)
    assert out.shape[-1] == c
    return a + out + (0.0 if shift is None else wide(shift))
