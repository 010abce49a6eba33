"""FLARE from the matrices of both of its softmaxes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, kept, softmax


def flare_attention(
    latents: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: float = 1.0,
    qk_norm: bool = False,
    eps: float = 1e-6,
    mask: ArrayLike | None = None,
) -> Float64:
    """See `longattn.linear`."""
    r, kn, vn = (np.asarray(x, np.float64) for x in (latents, k, v))
    if qk_norm:
        r, kn = (x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) for x in (r, kn))
    scores = scale * (r @ kn.swapaxes(-1, -2))
    if kn.shape[-2] == 0:
        return np.zeros_like(vn)
    encode = softmax(np.where(kept(mask, scores) > 0, scores, -np.inf))
    decode = softmax(scores.swapaxes(-1, -2))
    found: Float64 = decode @ (encode @ vn)
    return found
