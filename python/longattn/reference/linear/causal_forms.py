"""Causal forms of the methods over all keys: each row by the form over all keys of the rows up to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.linear.features import Float64


def causal(form: Any, q: Any, k: Any, v: Any, **options: Any) -> Float64:
    """Row `t` of `form`, an oracle over all keys, of the first `t + 1` rows."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    rows = [form(q[..., t : t + 1, :], k[..., : t + 1, :], v[..., : t + 1, :], **options) for t in range(q.shape[-2])]
    found: Float64 = np.concatenate(rows, axis=-2)
    return found


def causal_convolution(v: Any, weight: Any, group: int = 1) -> Float64:
    """`sum_s w[:, s] v_(t - s)` for each head of the queries, `weight` `[Dv, K]`."""
    v, w = np.asarray(v, np.float64), np.asarray(weight, np.float64)
    found: Float64 = np.zeros(v.shape)
    for s in range(min(w.shape[1], v.shape[-2])):
        found[..., s:, :] += w[:, s] * v[..., : v.shape[-2] - s, :]
    return np.repeat(found, group, axis=-3)
