"""Linear attention with random features, from all pairs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, divided, kept, pairs


def performer_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    projection: ArrayLike,
    *,
    kernel: str = "softmax",
    scale: float | None = None,
    eps: float = 0.0,
    mask: ArrayLike | None = None,
) -> Float64:
    """See `longattn.linear`. Exponents less the largest, of all keys that count and of each query."""
    qn, kn, vn = pairs(q, k, v)
    s = qn.shape[-1] ** -0.5 if scale is None else scale
    w = np.asarray(projection, np.float64).T
    qn, kn = s**0.5 * qn, s**0.5 * kn
    scores = np.zeros((*qn.shape[:-1], kn.shape[-2]))
    here = kept(mask, scores)
    if kernel == "relu":
        mapped = [np.maximum(x @ w, 0) + 1e-3 for x in (qn, kn)]
    else:
        logs = [x @ w - (x * x).sum(axis=-1, keepdims=True) / 2 for x in (qn, kn)]
        counted = here[..., 0, :, None] if qn.shape[-2] else np.ones((*kn.shape[:-1], 1))
        most = np.where(counted > 0, logs[1], -np.inf).max(axis=(-2, -1), keepdims=True, initial=-np.inf)
        most = np.where(np.isfinite(most), most, 0)
        mapped = [np.exp(logs[0] - logs[0].max(axis=-1, keepdims=True)), np.exp(np.minimum(logs[1] - most, 0))]
    found: Float64 = divided((mapped[0] @ mapped[1].swapaxes(-1, -2)) * here, eps) @ vn
    return found
