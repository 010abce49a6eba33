"""`trajectory_attention` and `flow_paths` from their rules, patch by patch; without a seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.vision.layers import Float64, softmax, wide


def flow_paths(flow: ArrayLike) -> NDArray[np.int64]:
    """See `longattn.vision.flow_paths`."""
    f = wide(flow)
    steps, _, height, width = f.shape
    numbers = np.arange((steps + 1) * height * width).reshape(steps + 1, height, width)
    for t in range(steps):
        taken = set()
        for y, x in np.ndindex(height, width):
            to = (y + int(np.rint(f[t, 1, y, x])), x + int(np.rint(f[t, 0, y, x])))
            if 0 <= to[0] < height and 0 <= to[1] < width and to not in taken:
                taken.add(to)
                numbers[t + 1, to[0], to[1]] = numbers[t, y, x]
    return numbers


def trajectory_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, flow: ArrayLike, *, scale: float | None = None, seed: int | None = None
) -> Float64:
    """See `longattn.vision.trajectory_attention`."""
    assert seed is None
    q, k, v = wide(q), wide(k), wide(v)
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    f = np.asarray(flow, np.float64)
    paths = np.stack([flow_paths(one).reshape(-1) for one in (f if f.ndim == 5 else [f] * len(q))])
    mask = (paths[:, :, None] == paths[:, None])[:, None]
    s = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.swapaxes(-1, -2))
    return np.asarray(softmax(np.where(mask, s, -np.inf)) @ v)
