"""`attention_rollout_select` and what it is made of, from their formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, softmax, wide


def _weights(q: ArrayLike, k: ArrayLike, scale: float | None) -> Float64:
    q, k = wide(q), wide(k)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return softmax((q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.swapaxes(-1, -2)))


def attention_rollout(layers: Sequence[Any], *, scale: float | None = None) -> Float64:
    """See `longattn.vision.attention_rollout`: all matrices, multiplied."""
    n = np.shape(layers[0][0])[2]
    total = np.eye(n)
    for q, k in layers:
        total = 0.5 * (_weights(q, k, scale).mean(axis=1) + np.eye(n)) @ total
    return np.asarray(total[:, 0])


def attention_rollout_select(
    layers: Sequence[Any],
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    count: int | None = None,
    ratio: float = 0.1,
    scale: float | None = None,
) -> Float64:
    """See `longattn.vision.attention_rollout_select`."""
    r = attention_rollout(layers, scale=scale)
    kept = max(1, round(ratio * (r.shape[1] - 1))) if count is None else count
    values = np.repeat(wide(v), np.shape(q)[1] // np.shape(v)[1], axis=1)
    full = _weights(q, k, scale) @ values
    out = []
    for b, one in enumerate(r):
        best = sorted(sorted(range(1, len(one)), key=lambda j: -one[j])[:kept])
        out.append(full[b][:, [0, *best]])
    return np.stack(out)


def pair_wise_cross_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, *, scale: float | None = None) -> Float64:
    """See `longattn.vision.pair_wise_cross_attention`."""
    other = np.arange(len(np.asarray(q))) ^ 1
    keys, values = (np.concatenate([wide(x), wide(x)[other]], axis=2) for x in (k, v))
    values = np.repeat(values, np.shape(q)[1] // values.shape[1], axis=1)
    return np.asarray(_weights(q, keys, scale) @ values)
