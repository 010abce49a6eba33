"""Based: linear attention whose features are the Taylor series of the softmax's exponential."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.linear._recurrence import Float64, recurrence


def based(
    q: Any,
    k: Any,
    v: Any,
    *,
    order: int = 2,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    **options: Any,
) -> tuple[Float64, Float64]:
    """Row after row in float64; see `longattn.linear`. `options` are states and bounds of sequences."""
    dim = np.shape(q)[-1]
    root = (dim**-0.5 if scale is None else scale) ** 0.5
    first, second = np.triu_indices(dim)

    def features(x: Any, coefficients: Any) -> Float64:
        x = root * np.asarray(x, np.float64)
        parts = [np.ones((*x.shape[:-1], 1)), x]
        if order == 2:
            parts.append(coefficients * x[..., first] * x[..., second])
        return np.concatenate(parts, axis=-1)

    keys = features(k, np.where(first == second, 0.5, 1.0))
    return recurrence(features(q, 1.0), keys, v, scale=1.0, normaliser=eps if normalize else None, **options)
