"""`strip_self_attention` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, depthwise, flat, linear, wide


def strip_self_attention(
    x: ArrayLike,
    kernel: ArrayLike,
    wq: Any,
    wk: Any,
    wv: Any,
    *,
    heads: int,
    wo: Any = None,
    scale: float = 1.0,
) -> Float64:
    """See `longattn.vision.strip_self_attention`."""
    a = wide(x)
    reduced = flat(depthwise(a, kernel, np.shape(kernel)[0], 0))
    out = attend(flat(linear(a, wq)), linear(reduced, wk), linear(reduced, wv), heads, scale)
    return linear(out.reshape(*a.shape[:3], -1), wo)
