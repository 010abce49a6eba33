"""Softmax weights of chosen query rows from their formula: float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention

Float64 = NDArray[np.float64]


def all_weights(q: ArrayLike, k: ArrayLike, **options: Any) -> tuple[Float64, Float64]:
    """Weights `[B, Hq, Lq, Lk]` (or without `B`) and lse: attention over values that are the unit vectors."""
    k = np.asarray(k)
    units = np.broadcast_to(np.eye(k.shape[-2]), (*k.shape[:-1], k.shape[-2]))
    weights, lse = attention(q, k, units, return_lse=True, **options)
    return weights, lse


def attention_weights(
    q: ArrayLike, k: ArrayLike, rows: ArrayLike, *, lse: ArrayLike | None = None, **options: Any
) -> Float64:
    """Weights `[B, Hq, n, Lk]` (or `[Hq, n, Lk]`); see `longattn.dense.attention_weights`."""
    weights, own = all_weights(q, k, **options)
    chosen = np.asarray(rows, int)
    weights, own = weights[..., chosen, :], own[..., chosen]
    return weights if lse is None else rescaled(weights, own, np.asarray(lse, np.float64))


def rescaled(weights: Float64, own: Float64, lse: Float64) -> Float64:
    """Weights for another log of the denominator; rows of -inf see nothing."""
    seen = (own > -np.inf) & (lse > -np.inf)
    factor = np.exp(np.where(seen, own, 0.0) - np.where(seen, lse, 0.0))
    return weights * np.where(seen, factor, 0.0)[..., None]
