"""PoolFormer's mixer from its formula, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pool_token_mixer(x: ArrayLike, *, size: int = 3) -> NDArray[np.float64]:
    """Output `[B, H, W, C]`; see `longattn.pool.pool_token_mixer`."""
    x = np.asarray(x, np.float64)
    y, reach = np.zeros_like(x), size // 2
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            near = x[:, max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
            y[:, i, j] = near.mean(axis=(1, 2)) - x[:, i, j]
    return y
