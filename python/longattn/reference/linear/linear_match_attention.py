"""Linear attention with `elu + 1`, from all pairs, and confidences of matches."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, divided, features, kept, pairs, softmax


def linear_match_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    q_mask: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    eps: float = 1e-6,
) -> Float64:
    """See `longattn.linear`."""
    qn, kn, vn = pairs(features(q, "elu1"), features(k, "elu1"), v)
    weights = qn @ kn.swapaxes(-1, -2)
    out: Float64 = divided(weights * kept(mask, weights), eps) @ vn
    if q_mask is not None:
        out = out * kept(q_mask, out.swapaxes(-1, -2)).swapaxes(-1, -2)
    return out


def dual_softmax(a: ArrayLike, b: ArrayLike, *, temperature: float = 0.1) -> Float64:
    """Confidences `[L, S]`."""
    one, two = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scores = one @ two.T / (one.shape[1] * temperature)
    return softmax(scores, axis=0) * softmax(scores, axis=1)
