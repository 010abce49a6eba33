"""`integrative_feature_cost_attention` and its cross-attention from their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, linear, softmax, wide


def integrative_feature_cost_attention(
    x: ArrayLike, cost: Any, wq: Any, wk: Any, wv: Any, *, scale: float | None = None
) -> tuple[Float64, Float64 | None]:
    """See `longattn.vision.integrative_feature_cost_attention`."""
    a, c = wide(x), None if cost is None else wide(cost)
    both = a if c is None else np.concatenate([a, c], axis=-1)
    q, k = linear(both, wq), linear(both, wk)
    weights = softmax((q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.swapaxes(1, 2)))
    return a + weights @ linear(a, wv), None if c is None else c + weights @ c


def feature_cost_cross_attention(
    source: ArrayLike, target: ArrayLike, cost: Any, wq: Any, wk: Any, wv: Any, *, scale: float | None = None
) -> tuple[Float64, Float64, Float64]:
    """See `longattn.vision.feature_cost_cross_attention`."""
    a, b = wide(source), wide(target)
    one, two = a, b
    c = np.zeros((len(a), a.shape[1], b.shape[1]))
    if cost is not None:
        c = wide(cost)
        one, two = np.concatenate([a, c], axis=-1), np.concatenate([b, c.swapaxes(1, 2)], axis=-1)
    q, k = linear(one, wq), linear(two, wk)
    logits = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.swapaxes(1, 2))
    to_a, to_b = softmax(logits) @ linear(b, wv), softmax(logits.swapaxes(1, 2)) @ linear(a, wv)
    return a + to_a, b + to_b, c + logits
