"""`long_short_distance_attention` from its formula, with the mask of all pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import (
    Float64,
    attend,
    flat,
    group_mask,
    inner_places,
    linear,
    relative_bias,
    wide,
)


def long_short_distance_attention(
    x: ArrayLike,
    wq: Any,
    wk: Any,
    wv: Any,
    *,
    heads: int,
    group: int = 7,
    interval: int = 1,
    adaptive_interval: bool = False,
    wo: Any = None,
    table: ArrayLike | None = None,
    scale: float | None = None,
) -> Float64:
    """See `longattn.vision.long_short_distance_attention`."""
    a = wide(x)
    extents = np.array(a.shape[1:3])
    steps = -(-extents // group) if adaptive_interval else np.array([interval, interval])
    if extents.min() <= group:
        group, steps = int(extents.min()), np.array([1, 1])
    size = (group, group)
    mask = group_mask(extents, size, steps)
    inner = inner_places(extents, size, steps)
    bias: Any = 0.0 if table is None else relative_bias(table, size)[:, inner[:, None], inner[None]]
    q, k, v = (flat(linear(a, w)) for w in (wq, wk, wv))
    return linear(attend(q, k, v, heads, scale, bias, mask).reshape(*a.shape[:3], -1), wo)
