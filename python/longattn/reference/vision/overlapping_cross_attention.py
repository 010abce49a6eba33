"""`overlapping_cross_attention` from its formula, window by window."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, flat, linear, wide


def overlapping_cross_attention(
    x: ArrayLike,
    wq: Any,
    wk: Any,
    wv: Any,
    *,
    heads: int,
    window: int = 16,
    overlap: float = 0.5,
    wo: Any = None,
    table: ArrayLike | None = None,
    layout: str = "canonical",
    mask_pad: bool = False,
    scale: float | None = None,
) -> Float64:
    """See `longattn.vision.overlapping_cross_attention`."""
    a = wide(x)
    m = window
    extra = int(m * overlap)
    mo, e = m + extra, extra // 2
    q, k, v = (linear(a, w) for w in (wq, wk, wv))
    k, v, inside = (np.pad(y, ((0, 0), (e, e), (e, e), (0, 0))) for y in (k, v, np.ones((1, *a.shape[1:3], 1))))
    bias: Any = 0.0
    if table is not None:
        t = wide(table)
        bias = np.zeros((heads, m, m, mo, mo))
        for y1, x1, y2, x2 in np.ndindex(m, m, mo, mo):
            if layout == "release":
                row = (y2 - y1 + m - mo + 1) * (m + mo - 1) + x2 - x1 + m - mo + 1
            else:
                row = (y1 - y2 + mo - 1) * (m + mo - 1) + x1 - x2 + mo - 1
            bias[:, y1, x1, y2, x2] = t[row]
        bias = bias.reshape(heads, m * m, mo * mo)
    out = np.zeros((*a.shape[:3], v.shape[-1]))
    for top in range(0, a.shape[1], m):
        for left in range(0, a.shape[2], m):
            own = (slice(None), slice(top, top + m), slice(left, left + m))
            seen = (slice(None), slice(top, top + mo), slice(left, left + mo))
            mask: Any = inside[seen].reshape(1, 1, 1, -1) > 0 if mask_pad else True
            out[own] = attend(flat(q[own]), flat(k[seen]), flat(v[seen]), heads, scale, bias, mask).reshape(
                out[own].shape
            )
    return linear(out, wo)
