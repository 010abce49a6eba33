"""`deformable_token_merging` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, convolution, gelu, linear, places, sample, wide


def deformable_token_merging(
    x: ArrayLike,
    w: Any,
    *,
    offset_kernel: ArrayLike | None = None,
    offset_bias: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    activation: bool = True,
) -> Float64:
    """See `longattn.vision.deformable_token_merging`."""
    a = wide(x)
    b, h, width, c = a.shape
    offsets = np.zeros((b, h // 2, width // 2, 8))
    if offset_kernel is not None:
        offsets = convolution(a, offset_kernel, 2, 0)
    if offset_bias is not None:
        offsets = offsets + wide(offset_bias)
    at = 2 * places((h // 2, width // 2)).reshape(h // 2, width // 2, 1, 2) + places((2, 2))
    found = sample(a, at + offsets.reshape(b, h // 2, width // 2, 4, 2), coordinates="pixel")
    out = linear(found.reshape(b, h // 2, width // 2, 4 * c), w)
    out = out * (1.0 if scale is None else wide(scale)) + (0.0 if shift is None else wide(shift))
    return gelu(out) if activation else out
