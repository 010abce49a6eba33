"""Feature grids and weights as callers pass them, and results as they get them back.

Layers take features `[B, ..., C]` in a storage dtype and weights as a matrix `[inputs, outputs]`, or a pair
`(matrix, bias)`. Arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_float_storage, check_floating, integer

Float32: TypeAlias = NDArray[np.float32]

#: A matrix `[inputs, outputs]`, or a pair `(matrix, bias)`.
Weights: TypeAlias = Any

#: Axes of a grid's array, by the number of its dimensions.
_AXES = {1: "[B, L, C]", 2: "[B, H, W, C]", 3: "[B, T, H, W, C]"}


def features(x: Array, name: str, rank: int, expected: str, like_shape: tuple[int | None, ...] = ()) -> Float32:
    """Features of a rank as float32; `like_shape` says axes (`None` for any) that are known already.

    float16 and bfloat16 cost a copy.
    """
    a = as_numpy(x, name)
    check_float_storage(a, name)
    if a.ndim != rank:
        raise ValueError(f"{name}: got shape {a.shape}, expected {expected}")
    if a.shape[-1] == 0:
        raise ValueError(f"{name}: got no channels in shape {a.shape}, expected at least 1")
    for axis, n in enumerate(like_shape):
        if n is not None and a.shape[axis] != n:
            wanted = tuple("any" if m is None else m for m in like_shape)
            raise ValueError(f"{name}: got shape {a.shape}, expected {expected} with axes {wanted}")
    return np.asarray(a, np.float32)


def grid(x: Array, name: str, dims: int | tuple[int, ...] = 2) -> Float32:
    """A grid of features `[B, X1, .., Xn, C]`, n one of `dims`, as float32, none of its axes empty."""
    allowed = (dims,) if isinstance(dims, int) else dims
    a = as_numpy(x, name)
    expected = " or ".join(_AXES[n] for n in allowed)
    if a.ndim - 2 not in allowed:
        raise ValueError(f"{name}: got shape {a.shape}, expected {expected}")
    wide = features(x, name, a.ndim, expected)
    if 0 in wide.shape[1:]:
        raise ValueError(f"{name}: got an empty axis in shape {wide.shape}, expected none")
    return wide


def same_shape(x: Array, name: str, other: NDArray[Any], other_name: str) -> Float32:
    """Features of the shape of others."""
    wide = features(x, name, other.ndim, f"{other.shape} as {other_name}")
    if wide.shape != other.shape:
        raise ValueError(f"{name}: got shape {wide.shape}, expected {other.shape} as {other_name}")
    return wide


def returned(x: Array, result: NDArray[Any]) -> Array:
    """A result in the kind and dtype of `x`."""
    return like(x, np.ascontiguousarray(result).astype(as_numpy(x, "x").dtype, copy=False))


def numbers(x: Array, name: str, shape: tuple[int | None, ...]) -> Float32:
    """Floating numbers of a shape (`None`: any length), as float32."""
    a = as_numpy(x, name, any_strides=True)
    check_floating(a, name)
    if a.ndim != len(shape) or any(n is not None and m != n for m, n in zip(a.shape, shape, strict=True)):
        wanted = ", ".join("n" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: got shape {a.shape}, expected [{wanted}]")
    return np.asarray(a, np.float32)


def odd_kernel(kernel: Array, name: str, shape: tuple[int | None, ...]) -> Float32:
    """A kernel whose sizes (`None` in `shape`) are odd, so that it has a middle."""
    taps = numbers(kernel, name, shape)
    if any(size % 2 == 0 for size, expected in zip(taps.shape, shape, strict=True) if expected is None):
        raise ValueError(f"{name}: got shape {taps.shape}, expected odd sizes")
    return taps


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection."""

    matrix: Float32
    bias: Float32 | None

    @classmethod
    def of(cls, w: Weights, name: str, inputs: int, outputs: int | None = None) -> Linear:
        """From a matrix or a pair; its shape is checked."""
        pair = isinstance(w, tuple | list)
        if pair and len(w) != 2:
            raise TypeError(f"{name}: got {len(w)} parts, expected a matrix or a pair (matrix, bias)")
        matrix = numbers(w[0] if pair else w, name, (inputs, outputs))
        if matrix.shape[1] == 0:
            raise ValueError(f"{name}: got shape {matrix.shape}, expected at least 1 output")
        bias = None if not pair or w[1] is None else numbers(w[1], f"{name} bias", (matrix.shape[1],))
        return cls(matrix, bias)

    @property
    def outputs(self) -> int:
        """Columns."""
        return int(self.matrix.shape[1])

    def __call__(self, x: Float32) -> Float32:
        """`x @ matrix + bias`."""
        y: Float32 = x @ self.matrix
        if self.bias is not None:
            y += self.bias
        return y


def optional_linear(w: Weights | None, name: str, inputs: int, outputs: int | None = None) -> Linear | None:
    """A projection, or none."""
    return None if w is None else Linear.of(w, name, inputs, outputs)


def head_count(heads: object, widths: dict[str, int], name: str = "heads") -> int:
    """A number of heads that divides all widths."""
    number = integer(heads, name, 1)
    for width_name, width in widths.items():
        if width % number:
            raise ValueError(f"{name}: got {number}, expected a divisor of the {width} channels of {width_name}")
    return number


def projections(
    channels: int, wq: Weights, wk: Weights, wv: Weights, heads: object
) -> tuple[Linear, Linear, Linear, int]:
    """Projections of queries, keys and values, and the number of heads in them."""
    q_of = Linear.of(wq, "wq", channels)
    k_of = Linear.of(wk, "wk", channels, q_of.outputs)
    v_of = Linear.of(wv, "wv", channels)
    return q_of, k_of, v_of, head_count(heads, {"wq": q_of.outputs, "wv": v_of.outputs})


def window_sizes(window: int | Sequence[int], dims: int, name: str = "window") -> tuple[int, ...]:
    """Places of a window along each axis, from one number or one for each."""
    given = tuple(window) if isinstance(window, Sequence) else (window,) * dims
    if len(given) != dims:
        raise ValueError(f"{name}: got {len(given)} numbers, expected {dims}")
    return tuple(integer(n, name, 1) for n in given)


def layer_norm(x: Float32, weight: Float32, bias: Float32, eps: float = 1e-5) -> Float32:
    """Layer norm over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(eps))
    normed: Float32 = centred / deviation * weight + bias
    return normed


def norm_weights(norm: Any, name: str, width: int) -> tuple[Float32, Float32]:
    """Weight and bias of a layer norm, from a pair."""
    if not isinstance(norm, tuple | list) or len(norm) != 2:
        raise TypeError(f"{name}: got {type(norm).__name__}, expected a pair (weight, bias)")
    return numbers(norm[0], f"{name} weight", (width,)), numbers(norm[1], f"{name} bias", (width,))
