"""Fastmax from all pairs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, divided, kept, pairs, standard


def fastmax_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    order: int = 2,
    coefficients: tuple[float, float, float] = (1.0, 1.0, 0.5),
    qk_norm: str = "standardise",
    temperature: float = 1.0,
    mask: ArrayLike | None = None,
) -> Float64:
    """See `longattn.linear`."""
    qn, kn, vn = pairs(q, k, v)
    if qk_norm == "standardise":
        qn, kn = standard(qn), standard(kn)
    elif qk_norm == "maxnorm":
        lengths = [np.linalg.norm(x, axis=-1, keepdims=True).max(axis=-2, keepdims=True, initial=0) for x in (qn, kn)]
        qn, kn = (x / np.where(n > 0, n, 1) for x, n in zip((qn, kn), lengths, strict=True))
    else:
        temperature = temperature * qn.shape[-1] ** 0.5
    s = qn @ kn.swapaxes(-1, -2) / temperature
    f = coefficients[0] + coefficients[1] * s + (coefficients[2] * s * s if order == 2 else 0)
    found: Float64 = divided(f * kept(mask, f)) @ vn
    return found
