"""Sums over softmax weights from their formulas: float64 numpy with materialised weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.dense.attention_weights import all_weights, rescaled


def prob_reduce(
    q: ArrayLike,
    k: ArrayLike,
    *,
    column_mass: bool = False,
    query_weights: ArrayLike | None = None,
    column_max: bool = False,
    segment_ids: ArrayLike | None = None,
    segment_count: int | None = None,
    entropy: bool = False,
    distance_moments: int = 0,
    distance_limit: int | None = None,
    row_max: bool = False,
    lse: ArrayLike | None = None,
    **options: Any,
) -> SimpleNamespace:
    """The attributes that `longattn.dense.prob_reduce` gives, without those that were not asked for."""
    p, own = all_weights(q, k, **options)
    if lse is not None:
        p, own = rescaled(p, own, np.asarray(lse, np.float64)), np.asarray(lse, np.float64)
    *heads, rows, keys = p.shape
    results: dict[str, Any] = {"lse": own}
    if column_mass:
        w = np.ones(rows) if query_weights is None else np.asarray(query_weights, np.float64)
        results["column_mass"] = (w[..., None] * p).sum(axis=-2)
    if column_max:
        results["column_max"] = p.max(axis=-2, initial=0.0)
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        count = int(ids.max(initial=-1)) + 1 if segment_count is None else segment_count
        of_segment = (ids[..., None] == np.arange(count)).astype(float)  # [Lk, S] or [B, Lk, S]
        if ids.ndim == 2 and len(heads) == 2:
            of_segment = of_segment[:, None]
        results["segment_mass"] = p @ of_segment
    if entropy:
        results["entropy"] = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
    if distance_moments:
        d = (np.arange(rows)[:, None] + keys - rows - np.arange(keys)).astype(float)
        if distance_limit is not None:
            d = np.clip(d, -distance_limit, distance_limit)
        moments = [(p * d**m).sum(axis=-1) for m in range(1, distance_moments + 1)]
        results["distance_moments"] = np.stack(moments, axis=-1)
    if row_max:
        results["row_max"] = p.max(axis=-1, initial=0.0)
        seen = results["row_max"] > 0
        results["row_max_key"] = np.where(seen, p.argmax(axis=-1) if keys else -1, -1)
    return SimpleNamespace(**results)
