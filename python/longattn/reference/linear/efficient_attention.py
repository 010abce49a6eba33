"""Efficient attention from all pairs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, kept, pairs, softmax


def efficient_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, norm: str = "softmax", mask: ArrayLike | None = None
) -> Float64:
    """See `longattn.linear`."""
    qn, kn, vn = pairs(q, k, v)
    here = kept(mask, np.zeros((*qn.shape[:-1], kn.shape[-2])))[..., :1, :].swapaxes(-1, -2)
    if qn.shape[-2] == 0 or kn.shape[-2] == 0:
        return np.zeros((*qn.shape[:-1], vn.shape[-1]))
    if norm == "scaling":
        weights = qn @ (kn * here).swapaxes(-1, -2) / np.maximum(here.sum(axis=-2, keepdims=True), 1)
    else:
        positions = softmax(np.where(here > 0, kn, -np.inf), axis=-2)
        weights = softmax(qn) @ positions.swapaxes(-1, -2)
    found: Float64 = weights @ vn
    return found
