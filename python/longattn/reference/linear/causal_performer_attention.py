"""Causal linear attention with random features, row after row."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.linear._recurrence import Float64, recurrence


def causal_performer_attention(
    q: Any,
    k: Any,
    v: Any,
    projection: Any,
    *,
    kernel: str = "softmax",
    scale: float | None = None,
    eps: float = 0.0,
    shift: float = 0.0,
    **options: Any,
) -> tuple[Float64, Float64]:
    """See `longattn.linear`. Exponents of a query are taken less their largest, those of keys less `shift`."""
    s = np.shape(q)[-1] ** -0.5 if scale is None else scale
    w = np.asarray(projection, np.float64).T
    queries, keys = (s**0.5 * np.asarray(x, np.float64) for x in (q, k))
    if kernel == "relu":
        mapped = [np.maximum(x @ w, 0) + 1e-3 for x in (queries, keys)]
    else:
        logs = [x @ w - (x * x).sum(axis=-1, keepdims=True) / 2 for x in (queries, keys)]
        mapped = [np.exp(logs[0] - logs[0].max(axis=-1, keepdims=True)), np.exp(logs[1] - shift)]
    return recurrence(mapped[0], mapped[1], v, scale=1.0, normaliser=eps, **options)
