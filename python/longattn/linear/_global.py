"""What the methods over sums of all keys share: their inputs, and the way through both passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import batched, check_floating, dense_inputs, integer, result_array, returned
from longattn.linear.key_statistics import accumulate, key_mask, read

Float32 = NDArray[np.float32]


def inputs(q: Array, k: Array, v: Array) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Queries, keys and values of rank 4 that fit each other."""
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    return batched(qn, 4), batched(kn, 4), batched(vn, 4)


def attend(
    q: Array,
    arrays: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    maps: tuple[Mapping[str, Any], Mapping[str, Any]],
    read_out: tuple[str, float, float],
    *,
    mask: Array | None = None,
    factors: Float32 | None = None,
    add: NDArray[Any] | None = None,
    out: Array | None = None,
) -> Any:
    """Sums over the keys, then what the queries read of them, in the kind, dtype and rank of `q`."""
    qn, kn, vn = arrays
    of_queries, of_keys = maps
    rank = len(q.shape)
    shape = (*qn.shape[:3], vn.shape[3])[4 - rank :]
    keep = key_mask(mask, kn.shape[0], kn.shape[2])
    result = result_array(out, q, shape, qn.dtype, {"q": qn, "k": kn, "v": vn})
    sums = accumulate(kn, vn, of_keys, keep)
    read(qn, of_queries, sums, read_out, batched(result, 4), factors=factors, add=add)
    return returned(out, q, result, None)


def position_shift(pos: Array | None, heads: int, keys: int, dim: int, name: str = "pos") -> NDArray[Any] | None:
    """Numbers `[L, H * D]` that are added to keys, as `[1, H, L, D]`."""
    if pos is None:
        return None
    x = as_numpy(pos, name)
    check_floating(x, name)
    if x.shape != (keys, heads * dim):
        raise ValueError(f"{name}: got shape {x.shape}, expected {(keys, heads * dim)}, all heads of a key together")
    return np.ascontiguousarray(x, np.float32).reshape(keys, heads, dim).swapaxes(0, 1)[None]


def map_size(size: object, tokens: int, what: str = "keys") -> tuple[int, int]:
    """Height and width of a map of `tokens` tokens."""
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise TypeError(f"size: got {size!r}, expected a pair (height, width)")
    height, width = (integer(n, "size", 1) for n in size)
    if height * width != tokens:
        raise ValueError(f"size: got {height} x {width}, expected the {tokens} {what} as a map")
    return height, width
