"""Hyena over maps and sequences: gates around a convolution as long as the input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_float_storage, finite, flag, items_of
from longattn.linear._channels import Float32, optional, parameter, product
from longattn.linear.convolution import causal_conv1d, depthwise_conv1d, depthwise_conv2d
from longattn.linear.toeplitz import Precision, toeplitz, toeplitz2d
from longattn.methods import Method
from longattn.reference import linear as reference


def hyena_pixel_conv(
    x: Array,
    w_in: Array,
    short: Array,
    kernel: Array,
    *,
    bias: Array | None = None,
    w_out: Array | None = None,
    norm: tuple[Array, Array] | None = None,
    causal: bool = False,
    precision: Precision = "float64",
) -> Array:
    """`(v * (conv(q * k) + bias * q * k)) w_out`, where `q, k, v` are thirds of a short convolution of `x w_in`.

    The long convolution is a true one, depthwise, with zeros outside the map, and its kernel may be larger than the
    map. Sequences go the same way with kernels of one axis.

    Args:
        x: map `[B, H, W, C]` or sequence `[B, L, C]`; float32, float16 or bfloat16.
        w_in: floating `[C, 3 C]`, to q, k and v.
        short: depthwise taps, floating `[3 C, kh, kw]` or `[3 C, K]`.
        kernel: long kernel, floating `[C, kh, kw]` or `[C, K]`; its middle, `kh // 2`, meets the place itself. For
            kernels that a small network makes see `hyena_pixel_kernel`.
        bias: floating `[C]`.
        w_out: floating `[C, Co]`; `None` leaves the C channels.
        norm: `(weight, bias)`, floating `[C]`, of a layer norm of `q * k`; `None` is none.
        causal: of a sequence, both convolutions reach back only: entry l of the kernel meets what is l tokens back.
        precision: of the transforms.

    Returns:
        `[B, H, W, Co]` or `[B, L, Co]` in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Two transforms of about `4 H W` numbers per channel, `3 * B * H * W * C * (C + kh * kw)` multiply-adds of the
        projection and the short convolution, and `C * Co` for each place.

    References:
        J. Spravil, S. Houben, S. Behnke, "HyenaPixel: Global Image Context with Convolutions", 2024, arXiv:2402.19305.
    """
    xn = as_numpy(x, "x")
    check_float_storage(xn, "x")
    if xn.ndim not in {3, 4}:
        raise ValueError(f"x: got shape {xn.shape}, expected [B, H, W, C] or [B, L, C]")
    channels, axes, back = xn.shape[-1], xn.ndim - 2, flag(causal, "causal")
    if back and axes == 2:
        raise ValueError("causal: got True for a map, expected a sequence")
    mixing = parameter(w_in, "w_in", (channels, 3 * channels), "[C, 3 C]")
    near = parameter(short, "short", (3 * channels, *(None,) * axes), "[3 C, kh, kw] or [3 C, K]")
    far = parameter(kernel, "kernel", (channels, *(None,) * axes), "[C, kh, kw] or [C, K]", np.float64)
    direct = optional(bias, "bias", (channels,), "[C]")
    projection = optional(w_out, "w_out", (channels, None), "[C, Co]")
    scales = _norm(norm, channels)
    h = product(xn, mixing)
    h = _short(h, near, axes, back)
    q, k, v = np.split(h, 3, axis=-1)
    gated = layer_norm(q * k, *scales) if scales is not None else q * k
    if axes == 2:
        y = toeplitz2d(gated, far, precision=precision)
    else:
        zero = 0 if back else far.shape[1] // 2
        y = toeplitz(gated, far, zero=zero, precision=precision)
    if direct is not None:
        y = y + direct * gated
    result = v * y
    result = result if projection is None else result @ projection
    return like(x, result.astype(xn.dtype, copy=False))


def hyena_pixel_kernel(
    encoding: Array,
    layers: Sequence[tuple[Array, Array]],
    frequency: float,
    delta: Array,
    shift: Array,
) -> NDArray[np.float64]:
    """A long kernel from a small network over an encoding of its places, under a window that falls with the distance.

    `sin(frequency * (z w + b))` through all layers but the last, which is linear, times
    `exp(-distance * |delta| / extent) + shift`, `distance` being that to the middle and `extent` the longer side.

    Args:
        encoding: floating `[E, kh, kw]` or `[E, K]`.
        layers: weights `[in, out]` and biases `[out]`, the last to C.
        frequency: of the sines.
        delta: floating `[C]`.
        shift: floating `[C]`.

    Returns:
        float64 `[C, kh, kw]` or `[C, K]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        The network's multiply-adds for each place.
    """
    z = as_numpy(encoding, "encoding", any_strides=True).astype(np.float64)
    if z.ndim not in {2, 3} or not z.size:
        raise ValueError(f"encoding: got shape {z.shape}, expected [E, kh, kw] or [E, K]")
    layers, times = items_of(layers, "layers", "pairs (weight, bias)"), finite(frequency, "frequency")
    if not layers or any(not isinstance(layer, tuple | list) or len(layer) != 2 for layer in layers):
        raise TypeError(f"layers: got {[type(x).__name__ for x in layers]}, expected at least one pair (weight, bias)")
    h = np.moveaxis(z, 0, -1)
    for number, (weight, added) in enumerate(layers):
        w = parameter(weight, f"layers[{number}] weight", (h.shape[-1], None), "[in, out]", np.float64)
        h = h @ w + parameter(added, f"layers[{number}] bias", (w.shape[1],), "[out]", np.float64)
        if number < len(layers) - 1:
            h = np.sin(times * h)
    channels, size = h.shape[-1], z.shape[1:]
    fall = np.abs(parameter(delta, "delta", (channels,), "[C]", np.float64))
    added = parameter(shift, "shift", (channels,), "[C]", np.float64)
    places = np.indices(size) - np.array([n // 2 for n in size]).reshape(-1, *(1,) * len(size))
    distance = np.sqrt((places**2).sum(axis=0))[..., None]
    kernel: NDArray[np.float64] = np.moveaxis(h * (np.exp(-distance * fall / max(size)) + added), -1, 0)
    return np.ascontiguousarray(kernel)


def layer_norm(x: Float32, weight: Float32, bias: Float32) -> Float32:
    """Layer norm of the last axis, epsilon 1e-5."""
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(1e-5))
    normed: Float32 = centred / deviation * weight + bias
    return normed


def _short(h: Float32, taps: Float32, axes: int, causal: bool) -> Float32:
    if axes == 2:
        return np.asarray(depthwise_conv2d(h, taps))
    return np.asarray(causal_conv1d(h, taps)[0] if causal else depthwise_conv1d(h, taps))


def _norm(norm: object, channels: int) -> tuple[Float32, Float32] | None:
    if norm is None:
        return None
    if not isinstance(norm, tuple | list) or len(norm) != 2:
        raise TypeError(f"norm: got {type(norm).__name__}, expected (weight, bias)")
    return (
        parameter(norm[0], "norm[0]", (channels,), "[C]"),
        parameter(norm[1], "norm[1]", (channels,), "[C]"),
    )


METHOD = Method(
    name="hyena_pixel_conv",
    family="linear",
    title="HyenaPixel: Global Image Context with Convolutions",
    year=2024,
    arxiv="2402.19305",
    function=hyena_pixel_conv,
    reference=reference.hyena_pixel_conv,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "The direct convolution gives the same as transforms.",
        "A kernel of 1 in the middle and no bias give `v * q * k`.",
        "A causal kernel of one axis is Hyena of order 2.",
    ),
    tests="tests/linear/test_hyena_pixel_conv.py",
    cost="Two transforms of about `4 H W` numbers per channel, and the projections.",
)
