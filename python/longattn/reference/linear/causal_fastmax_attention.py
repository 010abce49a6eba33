"""Causal Fastmax, row after row."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.linear._recurrence import Float64, recurrence
from longattn.reference.linear.features import standard


def causal_fastmax_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    order: int = 2,
    coefficients: tuple[float, float, float] = (1.0, 1.0, 0.5),
    qk_norm: str = "standardise",
    temperature: float = 1.0,
    **options: Any,
) -> tuple[Float64, Float64]:
    """See `longattn.linear`. `options` are states and bounds of sequences; keys' features have the coefficients."""
    dim = np.shape(q)[-1]
    heat = temperature * (dim**0.5 if qk_norm == "none" else 1.0)
    first, second = np.triu_indices(dim)

    def features(x: Any, c: tuple[float, float, float], twice: float) -> Float64:
        x = np.asarray(x, np.float64)
        x = standard(x) if qk_norm == "standardise" else x
        parts = [np.full((*x.shape[:-1], 1), c[0]), c[1] * x]
        if order == 2:
            parts.append(c[2] * np.where(first == second, 1.0, twice) * x[..., first] * x[..., second])
        return np.concatenate(parts, axis=-1)

    keys = features(k, (coefficients[0], coefficients[1] / heat, coefficients[2] / heat**2), 2.0)
    return recurrence(features(q, (1.0, 1.0, 1.0), 1.0), keys, v, scale=1.0, normaliser=0.0, **options)
