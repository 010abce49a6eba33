"""`compositional_quasi_attention` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, wide


def compositional_quasi_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    scale: float | None = None,
    causal: bool = False,
    mask: Any = None,
    centred: bool = False,
    doubled: bool = False,
) -> Float64:
    """See `longattn.vision.compositional_quasi_attention`."""
    a, b, c = wide(q), wide(k), wide(v)
    b, c = (np.repeat(x, a.shape[-3] // x.shape[-3], axis=-3) for x in (b, c))
    factor = a.shape[-1] ** -0.5 if scale is None else scale
    rows, keys = a.shape[-2], b.shape[-2]
    seen = np.broadcast_to(True if mask is None else mask, (*a.shape[:-1], keys))
    if causal:
        seen = seen & (np.arange(keys) <= np.arange(rows)[:, None] + keys - rows)
    similarity = np.tanh(alpha * factor * (a @ b.swapaxes(-1, -2)))
    distance = -beta * factor * np.abs(a[..., :, None, :] - b[..., None, :, :]).sum(axis=-1)
    if centred:
        count = np.maximum(seen.sum(axis=-1, keepdims=True), 1)
        distance = distance - np.where(seen, distance, 0.0).sum(axis=-1, keepdims=True) / count
    weights = similarity / (1 + np.exp(-distance)) * (2 if doubled else 1)
    out: Float64 = np.where(seen, weights, 0.0) @ c
    return out
