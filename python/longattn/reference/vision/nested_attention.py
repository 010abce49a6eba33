"""`nested_attention` from its formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, softmax, wide


def nested_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    nested: Mapping[int, Any],
    *,
    scale: float | None = None,
    mask: ArrayLike | None = None,
    value_norm: float | None = None,
) -> Float64:
    """See `longattn.vision.nested_attention`."""
    q, k, v = wide(q), wide(k), wide(v)
    group = q.shape[1] // k.shape[1]
    f = q.shape[-1] ** -0.5 if scale is None else scale

    def weights(keys: Float64, seen: Any = True) -> Float64:
        s = f * (q @ np.repeat(keys, group, axis=1).swapaxes(-1, -2))
        return softmax(np.where(seen, s, -np.inf))

    a = weights(k, True if mask is None else np.asarray(mask))
    plain = np.repeat(v, group, axis=1).copy()
    plain[:, :, list(nested)] = 0
    out = a @ plain
    for s, (keys, values) in nested.items():
        u = weights(wide(keys)) @ np.repeat(wide(values), group, axis=1)
        if value_norm is not None:
            norm = np.repeat(np.linalg.norm(v[:, :, s], axis=-1), group, axis=1)[..., None]
            u = u * (value_norm * norm / np.linalg.norm(u, axis=-1))[..., None]
        out = out + a[..., s, None] * u
    return np.asarray(out)
