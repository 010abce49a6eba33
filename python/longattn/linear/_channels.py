"""What functions over `[B, L, C]` rows of channels share: checks, weights, states and gates."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import check_float_storage, check_floating, integer, sequence_bounds

Float32 = NDArray[np.float32]


def storage_rows(x: Array, name: str, shape: tuple[int | None, ...], expected: str) -> NDArray[Any]:
    """An array in a storage dtype whose shape agrees wherever one is given."""
    xn = as_numpy(x, name)
    check_float_storage(xn, name)
    check_shape(xn, name, shape, expected)
    return xn


def parameter(
    x: Array, name: str, shape: tuple[int | None, ...], expected: str, dtype: DTypeLike = np.float32
) -> NDArray[Any]:
    """Weights of any floating dtype, contiguous in `dtype`."""
    xn = as_numpy(x, name, any_strides=True)
    check_floating(xn, name)
    check_shape(xn, name, shape, expected)
    return np.ascontiguousarray(xn, dtype)


def optional(x: Array | None, name: str, shape: tuple[int | None, ...], expected: str) -> Float32 | None:
    """As `parameter`, or nothing."""
    return None if x is None else parameter(x, name, shape, expected)


def check_shape(x: NDArray[Any], name: str, shape: tuple[int | None, ...], expected: str) -> None:
    got = x.shape
    if len(got) == len(shape):
        for n, m in zip(shape, got, strict=True):
            if n is not None and n != m:
                break
        else:
            return
    sizes = f" = {list(shape)}" if None not in shape else ""
    raise ValueError(f"{name}: got shape {got}, expected {expected}{sizes}")


def bounds_of(cu_seqlens: Array | None, batch: int, length: int) -> NDArray[np.int64] | None:
    """Bounds of the sequences that a batch of 1 holds."""
    if cu_seqlens is None:
        return None
    if batch != 1:
        raise ValueError(f"cu_seqlens: got a batch of {batch}, expected a batch of 1 that holds the sequences")
    return sequence_bounds(cu_seqlens, "cu_seqlens", length)


def state_of(
    initial_state: Array | None, out_state: NDArray[Any] | None, shape: tuple[int, ...], expected: str
) -> NDArray[np.float32]:
    """The array that holds the states before, and receives those after: `out_state`, or memory of its own."""
    start: Any = 0.0 if initial_state is None else parameter(initial_state, "initial_state", shape, expected)
    if out_state is None:
        return np.array(np.broadcast_to(start, shape), np.float32)
    if not isinstance(out_state, np.ndarray) or out_state.dtype != np.float32:
        raise TypeError(f"out_state: got {type(out_state).__name__}, expected a float32 numpy array")
    if out_state.shape != shape or not out_state.flags.c_contiguous or not out_state.flags.writeable:
        raise ValueError(f"out_state: got shape {out_state.shape}, expected a contiguous, writable array {shape}")
    if start is not out_state:
        out_state[...] = start
    return out_state


def map_size(size: object, rows: int, of: str) -> tuple[int, int]:
    """Height and width of a map that has just these rows; `of` says whose rows they are."""
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise TypeError(f"size: got {size!r}, expected a pair (height, width)")
    height, width = integer(size[0], "size", 1), integer(size[1], "size", 1)
    if height * width != rows:
        raise ValueError(f"size: got {height} x {width}, expected a map of the {rows} {of}")
    return height, width


def pointwise(name: str, x: NDArray[Any], factor: NDArray[Any] | None = None) -> Float32:
    """A function of every number, times `factor`: "exp", "sigmoid", "silu", "relu2" or "laplace"."""
    result = np.array(x, np.float32, order="C")
    wide = None if factor is None else np.ascontiguousarray(np.broadcast_to(factor, result.shape), np.float32)
    _core.pointwise_function(name, result.reshape(-1), None if wide is None else wide.reshape(-1))
    return result


def product(x: NDArray[Any], weights: Float32) -> Float32:
    """`x @ weights` in float32."""
    return np.asarray(x, np.float32) @ weights
