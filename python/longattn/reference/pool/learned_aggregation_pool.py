"""Pooling by attention of learned tokens, head by head."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, softmax


def learned_aggregation_pool(
    cls: ArrayLike,
    x: ArrayLike,
    w_q: ArrayLike,
    w_k: ArrayLike,
    w_v: ArrayLike,
    w_o: ArrayLike,
    *,
    heads: int = 1,
    ln_gamma: ArrayLike | None = None,
    ln_beta: ArrayLike | None = None,
    eps: float = 1e-6,
    layer_scale: Any = 1e-4,
    patches_only: bool = False,
) -> Float64:
    """See `longattn.pool`."""
    tokens, patches, wq, wk, wv, wo = (np.asarray(a, np.float64) for a in (cls, x, w_q, w_k, w_v, w_o))
    tokens = np.broadcast_to(tokens, (len(patches), *tokens.shape[-2:]))
    m, channels = tokens.shape[1:]
    u = np.concatenate([tokens, patches], axis=1)
    if ln_gamma is not None or ln_beta is not None:
        u = (u - u.mean(axis=-1, keepdims=True)) / np.sqrt(u.var(axis=-1, keepdims=True) + eps)
        u = u * np.asarray(1 if ln_gamma is None else ln_gamma, np.float64)
        u = u + np.asarray(0 if ln_beta is None else ln_beta, np.float64)
    q, k, v = u[:, :m] @ wq, u @ wk, u @ wv
    if patches_only:
        k, v = k[:, m:], v[:, m:]
    found = []
    for head in range(heads):
        own = slice(head * channels // heads, (head + 1) * channels // heads)
        scores = q[..., own] @ k[..., own].swapaxes(-1, -2) * (channels // heads) ** -0.5
        found.append(softmax(scores) @ v[..., own])
    update: Float64 = tokens + np.asarray(layer_scale, np.float64) * (np.concatenate(found, axis=-1) @ wo)
    return update
