"""`stacked_temporal_attention` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, layer_norm, linear, wide


def stacked_temporal_attention(
    x: ArrayLike, weights: Any, *, heads: int, norm: Any = None, base: float | None = 10000.0, causal: bool = False
) -> Float64:
    """See `longattn.vision.stacked_temporal_attention`."""
    a = wide(x)
    f, d = a.shape[1], a.shape[3] // heads
    rows = np.swapaxes(a, 1, 2)
    seen = rows if norm is None else layer_norm(rows, *norm)
    q, k, v = (linear(seen, w) for w in weights[:3])

    def turn(y: Float64) -> Float64:
        if base is None:
            return y
        z = y.reshape(*y.shape[:-1], heads, d)
        angle = np.arange(f)[:, None, None] * base ** (-2 * np.arange(d // 2) / d)
        one, two = z[..., : d // 2], z[..., d // 2 :]
        parts = [one * np.cos(angle) - two * np.sin(angle), two * np.cos(angle) + one * np.sin(angle)]
        return np.concatenate(parts, axis=-1).reshape(y.shape)

    mask: Any = np.tril(np.ones((f, f), bool)) if causal else True
    return a + np.swapaxes(linear(attend(turn(q), turn(k), v, heads, mask=mask), weights[3]), 1, 2)
