"""`hierarchical_global_local_attention` from its formula, with the mask of all pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, convolution, flat, linear, places, resize, wide


def hierarchical_global_local_attention(
    x: ArrayLike,
    local: Any,
    coarse: Any,
    *,
    heads: int,
    tiles: int,
    shifted: bool = False,
    alpha: float = 1.0,
    down: ArrayLike | None = None,
    up: ArrayLike | None = None,
) -> Float64:
    """See `longattn.vision.hierarchical_global_local_attention`."""
    a = wide(x)
    b, t, h, w, c = a.shape
    size = np.array([t, h // tiles, w // tiles])
    rolls = np.array([0, size[1] // 2, size[2] // 2]) if shifted and tiles > 1 else np.zeros(3, int)
    at = places((t, h, w))
    ids = np.concatenate([(at - rolls) % [t, h, w] // size, at < rolls], axis=1)
    mask = (ids[:, None] == ids[None]).all(axis=-1)

    def block(rows: Float64, weights: Any, mask: Any = True) -> Float64:
        q, k, v = (linear(rows, m) for m in weights[:3])
        return linear(attend(q, k, v, heads, mask=mask), weights[3])

    if down is None:
        small = a.reshape(b, t, h // tiles, tiles, w // tiles, tiles, c).mean(axis=(3, 5))
    else:
        frames = [convolution(a[:, i], np.asarray(down)[0], tiles, 0) for i in range(t)]
        small = np.stack(frames, axis=1)
    large = resize(block(flat(small), coarse).reshape(small.shape), (t, h, w))
    if up is not None:
        large = convolution(large, up)
    return block(flat(a), local, mask).reshape(a.shape) + alpha * large
