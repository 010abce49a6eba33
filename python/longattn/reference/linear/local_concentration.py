"""The local step of L2ViT from its formula, float64."""

from __future__ import annotations

from math import erf, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn.reference.linear.convolution import depthwise

Float64 = NDArray[np.float64]


def local_concentration(x: Any, first: Any, norm: Any, second: Any, *, eps: float = 1e-5) -> Float64:
    """See `longattn.linear`."""

    def conv(y: Float64, taps: Any, bias: Any) -> Float64:
        return depthwise(y, taps, tuple(k // 2 for k in np.shape(taps)[1:]), bias)

    x, (mean, var, gamma, beta) = np.asarray(x, np.float64), (np.asarray(w, np.float64) for w in norm)
    h = conv(x, *first)
    h = h * np.vectorize(lambda t: 0.5 * (1 + erf(t / sqrt(2))), otypes=[float])(h)
    found: Float64 = x + conv((h - mean) / np.sqrt(var + eps) * gamma + beta, *second)
    return found
