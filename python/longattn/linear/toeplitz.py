"""Long convolutions: weights by distance, over whole sequences or maps."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, like
from longattn._checks import integer, one_of, result_array
from longattn.linear._channels import parameter, storage_rows

Way = Literal["auto", "fft", "direct"]
Precision = Literal["float64", "float32"]

#: Taps up to which the direct product is faster than transforms, measured.
DIRECT_TAPS, DIRECT_TAPS_2D = 256, 512


def toeplitz(
    x: Array,
    kernel: Array,
    *,
    zero: int = 0,
    rows: int | None = None,
    method: Way = "auto",
    precision: Precision = "float64",
    out: Array | None = None,
) -> Array:
    """Long convolution, `y[i] = sum_j kernel[i - j + zero] * x[j]`, nothing where the kernel has no weight.

    A kernel of L weights with `zero=0` is causal; one of `2 L - 1` with `zero=L - 1` reaches everywhere.

    Args:
        x: `[B, L, C]` with a kernel per channel, or `[B, H, L, D]` with one per head; float32, float16 or bfloat16.
        kernel: floating `[C, span]`, or `[H, span]`.
        zero: the weight of the row's own distance, 0.
        rows: rows of the result; `None` is L.
        method: `"fft"` transforms, `"direct"` multiplies every tap in float32, `"auto"` takes the faster.
        precision: of the transforms. With float32 an output errs by the rounding of the largest terms, not of its own.
        out: memory for the result.

    Returns:
        `[B, rows, C]` or `[B, H, rows, D]` in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Two transforms of about `2 L` numbers per channel, or `L * min(L, span)` multiply-adds.
    """
    per_channel = getattr(x, "ndim", 0) == 3
    expected = "[B, L, C] or [B, H, L, D]"
    xn = storage_rows(x, "x", (None,) * (3 if per_channel else 4), expected)
    kernels = xn.shape[2] if per_channel else xn.shape[1]
    weights = parameter(kernel, "kernel", (kernels, None), "[C, span]" if per_channel else "[H, span]", np.float64)
    span, length = weights.shape[1], xn.shape[-2]
    at = integer(zero, "zero", 0, max(span - 1, 0))
    if span == 0:
        raise ValueError(f"kernel: got shape {weights.shape}, expected at least one weight")
    many = length if rows is None else integer(rows, "rows", 0)
    direct = is_direct(method, min(span, length + many), DIRECT_TAPS)
    double = is_double(precision)
    result = result_array(out, x, (*xn.shape[:-2], many, xn.shape[-1]), xn.dtype, {"x": xn})
    if not result.size:
        return like(x, result) if out is None else out
    if not direct:
        wide, to = (xn[:, None], result[:, None]) if per_channel else (xn, result)
        _core.toeplitz(wide, weights, at, per_channel, double, to)
    else:
        taps = np.ascontiguousarray(weights[:, ::-1], np.float32)
        centre = (0, span - 1 - at)
        if per_channel:
            _core.depthwise(xn[:, None], np.ascontiguousarray(taps.T[None]), centre, result[:, None])
        else:
            for h in range(kernels):
                own = np.ascontiguousarray(np.broadcast_to(taps[h][:, None], (span, xn.shape[3])))[None]
                _core.depthwise(xn[:, h, None], own, centre, result[:, h, None])
    return like(x, result) if out is None else out


def toeplitz2d(
    x: Array,
    kernel: Array,
    *,
    centre: tuple[int, int] | None = None,
    method: Way = "auto",
    precision: Precision = "float64",
    out: Array | None = None,
) -> Array:
    """Long convolution of a map, `y[i, j] = sum kernel[i - p + centre[0], j - q + centre[1]] * x[p, q]`.

    This is a true convolution: the kernel is flipped against `depthwise_conv2d`. It may be larger than the map.

    Args:
        x: `[B, H, W, C]`; float32, float16 or bfloat16.
        kernel: floating `[C, kh, kw]`.
        centre: the weight of the place itself; `None` is `(kh // 2, kw // 2)`.
        method: as in `toeplitz`.
        precision: as in `toeplitz`.
        out: memory for the result.

    Returns:
        `[B, H, W, C]` in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Two transforms of about `4 * H * W` numbers per channel, and a copy of the map; or `H * W * kh * kw`
        multiply-adds.
    """
    xn = storage_rows(x, "x", (None, None, None, None), "[B, H, W, C]")
    batch, height, width, channels = xn.shape
    weights = parameter(kernel, "kernel", (channels, None, None), "[C, kh, kw]", np.float64)
    high, wide = weights.shape[1:]
    if high * wide == 0:
        raise ValueError(f"kernel: got shape {weights.shape}, expected at least one weight")
    if centre is None:
        up, left = high // 2, wide // 2
    elif isinstance(centre, tuple | list) and len(centre) == 2:
        up, left = integer(centre[0], "centre", 0, high - 1), integer(centre[1], "centre", 0, wide - 1)
    else:
        raise TypeError(f"centre: got {centre!r}, expected a pair of integers")
    direct, double = is_direct(method, high * wide, DIRECT_TAPS_2D), is_double(precision)
    result = result_array(out, x, xn.shape, xn.dtype, {"x": xn})
    if not result.size:
        return like(x, result) if out is None else out
    if direct:
        taps = np.ascontiguousarray(weights[:, ::-1, ::-1].transpose(1, 2, 0), np.float32)
        _core.depthwise(xn, taps, (high - 1 - up, wide - 1 - left), result)
    else:
        flat, zero, stride = lines(weights, (up, left), (height, width))
        rows = on_lines(xn, stride)
        line_out = np.empty(rows.shape, np.float32)
        _core.toeplitz(rows[:, None], flat, zero, True, double, line_out[:, None])
        result[...] = line_out.reshape(batch, height, stride, channels)[:, :, :width]
    return like(x, result) if out is None else out


def lines(kernel: NDArray[Any], centre: tuple[int, int], size: tuple[int, int]) -> tuple[NDArray[np.float64], int, int]:
    """A kernel over a map as one over its lines, laid one after another with gaps of zeros.

    The gaps are so wide that a distance along the lines is of one pair of distances, or of none that has a weight.

    Returns:
        `[C, span]`, the weight of distance 0, and how far apart lines begin.
    """
    (up, left), (height, width) = centre, size
    up_kept, down = min(up, height - 1), min(kernel.shape[1] - 1 - up, height - 1)
    left_kept, right = min(left, width - 1), min(kernel.shape[2] - 1 - left, width - 1)
    stride = width + max(left_kept, right)
    kept = kernel[:, up - up_kept : up + down + 1, left - left_kept : left + right + 1]
    flat = np.zeros((len(kernel), (up_kept + down + 1) * stride + left_kept + right))
    for i in range(up_kept + down + 1):
        flat[:, i * stride : i * stride + left_kept + right + 1] += kept[:, i]
    return flat, up_kept * stride + left_kept, stride


def on_lines(x: NDArray[Any], stride: int) -> NDArray[Any]:
    """A map `[.., H, W, C]` as `[.., H * stride, C]`, zeros in the gaps."""
    *outer, height, width, channels = x.shape
    rows = np.zeros((*outer, height, stride, channels), x.dtype)
    rows[..., :width, :] = x
    return rows.reshape(*outer, height * stride, channels)


def is_direct(method: object, taps: int, most: int) -> bool:
    """Whether to multiply every tap, of so many."""
    one_of(method, "method", get_args(Way))
    return method == "direct" or (method == "auto" and taps <= most)


def is_double(precision: object) -> bool:
    """Whether transforms are in float64."""
    one_of(precision, "precision", get_args(Precision))
    return precision == "float64"
