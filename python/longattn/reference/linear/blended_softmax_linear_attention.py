"""A blend of softmax and linear attention, from all pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, divided, features, pairs, softmax


def blended_softmax_linear_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, r: Any, *, phi: Any = "softmax", scale: float | None = None
) -> Float64:
    """See `longattn.linear`."""
    qn, kn, vn = pairs(q, k, v)
    s = qn.shape[-1] ** -0.5 if scale is None else scale
    exact = softmax(s * (qn @ kn.swapaxes(-1, -2))) @ vn
    mapped_q, mapped_k, _ = pairs(features(q, phi), features(k, phi), v)
    linear = divided(mapped_q @ mapped_k.swapaxes(-1, -2)) @ vn
    share = float(np.asarray(r).reshape(()))
    found: Float64 = share * exact + (1 - share) * linear
    return found
