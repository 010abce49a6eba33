"""`mediator_attention` from its formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, depthwise, pool_cells, resize, softmax, wide


def mediator_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    shape: Sequence[int],
    *,
    mediators: int = 49,
    t: ArrayLike | None = None,
    scale: float | None = None,
    gather_bias: Any = None,
    spread_bias: Any = None,
    v_kernel: ArrayLike | None = None,
) -> Float64:
    """See `longattn.vision.mediator_attention`."""
    q, k, v = wide(q), wide(k), wide(v)
    batch, heads, n, dim = q.shape
    s = dim**-0.5 if scale is None else scale
    if t is None:
        side = math.isqrt(mediators)
        cells = pool_cells(q.reshape(batch * heads, *shape, dim), (side, side))
        t = cells.reshape(batch, heads, mediators, dim)
    t = wide(t)

    def bias(parts: Any) -> Any:
        if parts is None:
            return 0.0
        coarse, rows, columns = (wide(part) for part in parts)
        image = np.moveaxis(coarse.reshape(1, -1, *coarse.shape[2:]), 1, -1)
        fine = np.moveaxis(resize(image, shape), -1, 1).reshape(*coarse.shape[:2], *shape)
        return (fine + rows + columns).reshape(*coarse.shape[:2], n)

    a1 = softmax(s * t @ k.swapaxes(-1, -2) + bias(gather_bias))
    spread = bias(spread_bias)
    a2 = softmax(s * q @ t.swapaxes(-1, -2) + (spread if spread_bias is None else spread.swapaxes(-1, -2)))
    out: Float64 = a2 @ (a1 @ v)
    if v_kernel is not None:
        image = v.swapaxes(1, 2).reshape(batch, *shape, -1)
        out = out + depthwise(image, v_kernel).reshape(batch, n, heads, -1).swapaxes(1, 2)
    return out
