"""`forward_cross_attention` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, flat, layer_norm, linear, offset_bias, wide


def forward_cross_attention(
    x: ArrayLike,
    cross: ArrayLike,
    wq: Any,
    wk: Any,
    wv: Any,
    *,
    heads: int,
    wo: Any = None,
    offset_table: ArrayLike | None = None,
    cross_bias: ArrayLike | None = None,
    cross_scale: ArrayLike | None = None,
    cross_norm: Any = None,
    scale_after_norm: bool = False,
    scale: float | None = None,
) -> Float64:
    """See `longattn.vision.forward_cross_attention`."""
    a, s = wide(x), wide(cross)
    n = a.shape[1] * a.shape[2]
    factors = 1.0 if cross_scale is None else wide(cross_scale)[:, None]
    s = s if scale_after_norm else s * factors
    s = s if cross_norm is None else layer_norm(s, *cross_norm)
    s = s * factors if scale_after_norm else s
    keys = np.concatenate([flat(a), s], axis=1)
    own = np.zeros((heads, n, n)) if offset_table is None else offset_bias(offset_table, a.shape[1:3])
    other = np.zeros((heads, s.shape[1])) if cross_bias is None else wide(cross_bias)
    bias = np.concatenate([own, np.broadcast_to(other[:, None], (heads, n, s.shape[1]))], axis=-1)
    out = attend(linear(flat(a), wq), linear(keys, wk), linear(keys, wv), heads, scale, bias)
    return linear(out.reshape(*a.shape[:3], -1), wo)
