"""Rotary positions of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def turned(x: NDArray[np.float32], positions: NDArray[Any], base: float) -> NDArray[np.float32]:
    """Rows `[..., D]` turned by positions that broadcast to their leading axes; dimension `d` goes with `d + D / 2`."""
    half = x.shape[-1] // 2
    angle = positions[..., None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
