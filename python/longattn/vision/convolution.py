"""Convolutions of grids of features, channels last."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from longattn import _core
from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import check_float_storage, integer
from longattn.vision._inputs import Float32, numbers
from longattn.vision.partition import Sizes
from longattn.vision.sample import extent_of, grid_rows


def depthwise_convolution(
    x: Array, kernel: Array, *, stride: Sizes = 1, padding: Sizes | str = "same", bias: Array | None = None
) -> Array:
    """Convolution of each channel with a kernel of its own (a cross-correlation, as in every framework).

    Args:
        x: grid `[B, X1, .., Xn, C]`, n = 1 to 3; float32, float16 or bfloat16.
        kernel: floating `[k1, .., kn, C]`.
        stride: positions from one output to the next.
        padding: zeros before and after each axis; "same" is `k // 2`, for odd `k` and stride 1 the input's shape.
        bias: floating `[C]`, added.

    Returns:
        `[B, Y1, .., Yn, C]`, `Y = (X + 2 * padding - k) // stride + 1`, in the kind and dtype of `x`; arithmetic is
        float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, a kernel larger than the padded grid.

    Cost:
        `k1 * .. * kn` multiply-adds per output.

    Example:
        >>> import numpy as np, longattn.vision
        >>> x = np.ones((1, 5, 5, 2), np.float32)
        >>> longattn.vision.depthwise_convolution(x, np.ones((3, 3, 2)))[0, 0, :, 0].tolist()
        [4.0, 6.0, 6.0, 6.0, 4.0]
    """
    xn = as_numpy(x, "x")
    check_float_storage(xn, "x")
    n = xn.ndim - 2
    if not 1 <= n <= 3 or 0 in xn.shape[1:]:
        raise ValueError(f"x: got shape {xn.shape}, expected [B, X1, .., Xn, C], n = 1 to 3, no axis empty")
    weights = numbers(kernel, "kernel", (*(None,) * n, xn.shape[-1]))
    taps, steps, before, outputs = _shape(xn.shape[1:-1], weights.shape[:n], stride, padding)
    added = None if bias is None else numbers(bias, "bias", (xn.shape[-1],))
    out = np.empty((xn.shape[0], *outputs, xn.shape[-1]), xn.dtype)
    if out.size:
        # Along each axis: places of the grid, outputs, taps, padding, stride.
        given = ((xn.shape[1:-1], 1), (outputs, 1), (taps, 1), (before, 0), (steps, 1))
        _, _, (deep, high, wide), first, step = every = [extent_of(one, fill) for one, fill in given]
        _core.depthwise(
            grid_rows(xn), reshaped(np.ascontiguousarray(weights), deep * high, wide, -1), first[1:],
            reshaped(out, len(xn), -1, *out.shape[-2:]), bias=added, stride=step[1:], depth=[one[0] for one in every],
        )  # fmt: skip
    return like(x, out)


def convolution(
    x: Float32, kernel: Float32, *, stride: Sizes = 1, padding: Sizes | str = "same", bias: Float32 | None = None
) -> Float32:
    """Convolution of a grid `[B, X1, .., Xn, C]` with `[k1, .., kn, C, C']`: a matrix product for each tap."""
    n = x.ndim - 2
    taps, steps, before, outputs = _shape(x.shape[1:-1], kernel.shape[:n], stride, padding)
    spans = [(o - 1) * s + k for o, s, k in zip(outputs, steps, taps, strict=True)]
    after = [max(span - p - m, 0) for span, p, m in zip(spans, before, x.shape[1:-1], strict=True)]
    padded = np.pad(x, [(0, 0), *zip(before, after, strict=True), (0, 0)])
    out = np.zeros((x.shape[0], *outputs, kernel.shape[-1]), np.float32)
    for tap in itertools.product(*(range(k) for k in taps)):
        part = (slice(t, t + (o - 1) * s + 1, s) for t, o, s in zip(tap, outputs, steps, strict=True))
        out += padded[(slice(None), *part)] @ kernel[tap]
    return out if bias is None else out + bias


def gelu(x: Float32) -> Float32:
    """`x * Phi(x)`, `Phi` the normal distribution function, of a new array."""
    out = np.array(x, np.float32, order="C")
    if out.size:
        _core.pointwise_function("gelu", out.reshape(-1))
    return out


def mean_pool_cells(x: Float32, sizes: Sequence[int]) -> Float32:
    """Means over cells of so many places per axis; what does not fill a cell at the end of an axis is left out."""
    if all(size == 1 for size in sizes):
        return x
    kernel = np.full((*sizes, x.shape[-1]), 1 / math.prod(sizes), np.float32)
    pooled: Float32 = depthwise_convolution(x, kernel, stride=tuple(sizes), padding=0)
    return pooled


def _shape(
    extents: tuple[int, ...], taps: tuple[int, ...], stride: Sizes, padding: Sizes | str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Taps, strides, padding and outputs of each axis."""
    n = len(extents)
    if 0 in taps:
        raise ValueError(f"kernel: got {taps} taps, expected at least 1")
    steps = _each(stride, "stride", n, 1)
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(f"padding: got {padding!r}, expected 'same' or numbers")
        before = tuple(k // 2 for k in taps)
    else:
        before = _each(padding, "padding", n, 0)
    spans = tuple(x + 2 * p for x, p in zip(extents, before, strict=True))
    if any(k > span for k, span in zip(taps, spans, strict=True)):
        raise ValueError(f"kernel: got {taps} taps, expected at most the padded grid's {spans}")
    outputs = tuple((span - k) // s + 1 for span, k, s in zip(spans, taps, steps, strict=True))
    # A longer step leads out of the grid as well, and memory would be asked for as far as it leads.
    steps = tuple(min(s, span - k + 1) for span, k, s in zip(spans, taps, steps, strict=True))
    return tuple(taps), steps, before, outputs


def _each(given: Any, name: str, n: int, least: int) -> tuple[int, ...]:
    values = tuple(given) if isinstance(given, Sequence) else (given,) * n
    if len(values) != n:
        raise ValueError(f"{name}: got {len(values)} numbers, expected {n}")
    return tuple(integer(value, name, least) for value in values)


def adaptive_pool(x: Float32, extents: tuple[int, ...]) -> Float32:
    """Means over cells `floor(i * X / Y) .. ceil((i + 1) * X / Y) - 1` of each axis, `[B, Y1, .., Yn, C]`."""
    out = x
    for axis, (size, count) in enumerate(zip(x.shape[1:-1], extents, strict=True), start=1):
        edges = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        parts = [out.take(range(a, b), axis=axis).mean(axis=axis, dtype=np.float32) for a, b in edges]
        out = np.stack(parts, axis=axis)
    return np.ascontiguousarray(out, np.float32)
