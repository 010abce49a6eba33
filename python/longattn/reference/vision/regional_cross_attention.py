"""`regional_cross_attention` from its formula: a place at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, softmax, wide


def regional_cross_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    regions: ArrayLike,
    *,
    lengths: ArrayLike | None = None,
    null: ArrayLike | None = None,
    scale: float | None = None,
) -> Float64:
    """See `longattn.vision.regional_cross_attention`."""
    q, k, v = wide(q), wide(k), wide(v)
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    batch, _, height, width, dim = q.shape
    of = np.broadcast_to(np.asarray(regions), (batch, height, width))
    each = np.broadcast_to(k.shape[3] if lengths is None else np.asarray(lengths), (batch, k.shape[2]))
    out = np.zeros((*q.shape[:4], v.shape[4]))
    for b, h, y, x in np.ndindex(*q.shape[:4]):
        region = int(of[b, y, x])
        if region < 0:
            out[b, h, y, x] = 0.0 if null is None else wide(null)[h]
            continue
        n = int(each[b, region])
        s = (dim**-0.5 if scale is None else scale) * (k[b, h, region, :n] @ q[b, h, y, x])
        out[b, h, y, x] = softmax(s) @ v[b, h, region, :n] if n else 0.0
    return out
