"""Linear attention with a bounded denominator, from all pairs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, kept, pairs


def l2vit_linear_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    tau: ArrayLike | None = None,
    den_min: float = 100.0,
    mask: ArrayLike | None = None,
) -> Float64:
    """See `longattn.linear`."""
    qn, kn, vn = pairs(q, k, v)
    heads, dim = qn.shape[-3], qn.shape[-1]
    factors = np.full(heads, dim**-0.5) if tau is None else np.asarray(tau, np.float64)
    weights = np.maximum(qn, 0) @ np.maximum(kn, 0).swapaxes(-1, -2)
    weights = weights * kept(mask, weights)
    below = np.maximum(weights.sum(axis=-1, keepdims=True), den_min)
    shares = np.divide(weights, below, out=np.zeros_like(weights), where=below > 0)
    found: Float64 = factors[:, None, None] * (shares @ vn)
    return found
