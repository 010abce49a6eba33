"""Local linear attention: one linear system per query."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, pairs, softmax


def local_linear_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    ridge: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float64:
    """See `longattn.linear`; solved exactly."""
    qn, kn, vn = pairs(q, k, v)
    s = qn.shape[-1] ** -0.5 if scale is None else scale
    scores = s * (qn @ kn.swapaxes(-1, -2))
    rows, keys = scores.shape[-2:]
    if causal:
        scores = np.where(np.tri(rows, keys, keys - rows, dtype=bool), scores, -np.inf)
    if rows == 0 or keys == 0:
        return np.zeros((*qn.shape[:-1], vn.shape[-1]))
    p = softmax(scores)
    z = kn[..., None, :, :] - qn[..., None, :]
    mu = np.einsum("...ij,...ijd->...id", p, z)
    lam = np.asarray(ridge, np.float64)
    lam = np.broadcast_to(lam[:, None] if lam.ndim == 1 else lam, qn.shape[:-1])
    matrix = np.einsum("...ij,...ijd,...ije->...ide", p, z, z) + lam[..., None, None] * np.eye(qn.shape[-1])
    rho = np.linalg.solve(matrix, mu[..., None])[..., 0]
    below = np.maximum(1 - (mu * rho).sum(axis=-1), 1e-6)
    weights = p * (1 - np.einsum("...ijd,...id->...ij", z, rho)) / below[..., None]
    found: Float64 = weights @ vn
    return found
