"""Arrays to time on: aligned, and filled at the speed of a copy."""

from __future__ import annotations

import functools
import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
POOL = (1 << 22) - 3  # odd: rows whose width is a power of two begin at another place of it each time


def aligned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Uninitialised array on a cache line, so that no candidate suffers from where the allocator put it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array: NDArray[Any] = raw[start : start + size].view(dtype).reshape(shape)
    return array


def gaussian(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Normal numbers, a pool of four million over and over from a random place: good enough for what is timed."""
    array = aligned(shape, dtype)
    flat, pool = array.reshape(-1), _pool(np.dtype(dtype))
    done, start = 0, int(rng.integers(POOL))
    while done < flat.size:
        count = min(POOL - start, flat.size - done)
        flat[done : done + count] = pool[start : start + count]
        done, start = done + count, 0
    return array


@functools.cache
def _pool(dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.random.default_rng(0).standard_normal(POOL, dtype=np.float32).astype(dtype)
