"""Grouped linear attention with a local convolution, from the matrix of all pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.linear.features import Float64


def grouped_linear_attention_local_conv(
    q: Any, k: Any, v: Any, weight: Any = None, *, group_size: int = 64, sim_local: str = "relu2"
) -> Float64:
    """See `longattn.linear`; the output alone."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads, length = v.shape[-3], v.shape[-2]
    q, k = (np.divide(x, np.linalg.norm(x, axis=-1, keepdims=True) + 1e-300) for x in (q, k))
    k = np.repeat(k, heads // k.shape[-3], axis=-3)
    convolved = np.zeros_like(v)
    if weight is not None:
        w = np.asarray(weight, np.float64)
        for t in range(min(w.shape[1], length)):
            convolved[..., t:, :] += w[:, t, None, None] * v[..., : length - t, :]
    group = q.shape[-3] // heads
    k, v, convolved = (np.repeat(x, group, axis=-3) for x in (k, v, convolved))
    scores = q @ k.swapaxes(-1, -2)
    near = scores if sim_local == "linear" else np.maximum(scores, 0) ** 2
    of = np.arange(length) // group_size
    weights = np.where(of[:, None] == of[None], near, scores)
    found: Float64 = np.tril(weights) @ v + convolved
    return found
