"""`global_query_window_attention` from its formula, with the mask of all pairs."""

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


def global_query_window_attention(
    x: ArrayLike,
    wk: Any,
    wv: Any,
    *,
    heads: int,
    window: int = 7,
    queries: ArrayLike | None = None,
    wq: Any = None,
    wo: Any = None,
    table: ArrayLike | None = None,
    scale: float | None = None,
) -> Float64:
    """See `longattn.vision.global_query_window_attention`."""
    a = wide(x)
    extents, size = a.shape[1:3], (window, window)
    inner = inner_places(extents, size)
    q = flat(linear(a, wq)) if queries is None else wide(queries)[:, inner]
    bias: Any = 0.0 if table is None else relative_bias(table, size)[:, inner[:, None], inner[None]]
    k, v = (flat(linear(a, w)) for w in (wk, wv))
    out = attend(q, k, v, heads, scale, bias, group_mask(extents, size))
    return linear(np.reshape(out, (*a.shape[:3], -1)), wo)
