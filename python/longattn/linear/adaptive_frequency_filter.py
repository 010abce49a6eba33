"""AFFNet's filter: a mask over frequencies that a small network makes of the spectrum itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like
from longattn._checks import real
from longattn.linear._channels import optional, parameter, storage_rows
from longattn.methods import Method
from longattn.reference import linear as reference


def adaptive_frequency_filter(
    x: Array,
    w1: Array,
    w2: Array,
    *,
    b1: Array | None = None,
    b2: Array | None = None,
    threshold: float = 0.01,
) -> Array:
    """Circular convolution of a map with a kernel made of its own spectrum, and the map added.

    `X = rfft2(x)`, orthonormal, goes through a complex network of two layers, block by block of channels: with
    `relu` of real and imaginary parts, `o = relu(X w1 + b1) w2 + b2`. Parts of `o` shrink by `threshold` towards 0 and
    are the mask: `y = irfft2(mask * X) + x`.

    Args:
        x: `[B, C, H, W]`; float32, float16 or bfloat16.
        w1: real and imaginary weights of the first layer, floating `[2, blocks, C / blocks, hidden]`.
        w2: of the second, `[2, blocks, hidden, C / blocks]`.
        b1: floating `[2, blocks, hidden]`.
        b2: floating `[2, blocks, C / blocks]`.
        threshold: by which real and imaginary parts shrink; at least 0.

    Returns:
        `[B, C, H, W]` in the kind and dtype of `x`. Arithmetic is float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Two transforms per channel, and `4 * B * H * (W / 2 + 1) * C * hidden` multiply-adds twice.

    References:
        Z. Huang, Z. Zhang, C. Lan, Z.-J. Zha, Y. Lu, B. Guo, "Adaptive Frequency Filters As Efficient Global Token
        Mixers", 2023, arXiv:2307.14008.
    """
    xn = storage_rows(x, "x", (None, None, None, None), "[B, C, H, W]")
    batch, channels, height, width = xn.shape
    first = parameter(w1, "w1", (2, None, None, None), "[2, blocks, C / blocks, hidden]")
    _, blocks, inputs, hidden = first.shape
    if blocks * inputs != channels or not blocks:
        raise ValueError(f"w1: got {blocks} blocks of {inputs} channels, expected the {channels} of x")
    second = parameter(w2, "w2", (2, blocks, hidden, inputs), "[2, blocks, hidden, C / blocks]")
    added = optional(b1, "b1", (2, blocks, hidden), "[2, blocks, hidden]")
    after = optional(b2, "b2", (2, blocks, inputs), "[2, blocks, C / blocks]")
    least = real(threshold, "threshold")
    if not 0 <= least < np.inf:
        raise ValueError(f"threshold: got {threshold}, expected a number of at least 0")
    wide = np.ascontiguousarray(xn, np.float32)
    if not wide.size:
        return like(x, xn.copy())
    spectrum = np.fft.rfft2(wide, norm="ortho").astype(np.complex64)
    # Blocks in front, frequencies as rows.
    rows = spectrum.reshape(batch, blocks, inputs, -1).swapaxes(2, 3)
    h = rows @ (first[0] + 1j * first[1])
    if added is not None:
        h += (added[0] + 1j * added[1])[:, None]
    h = np.maximum(h.real, 0) + 1j * np.maximum(h.imag, 0)
    o = h @ (second[0] + 1j * second[1])
    if after is not None:
        o += (after[0] + 1j * after[1])[:, None]
    mask = _shrunk(o.real, least) + 1j * _shrunk(o.imag, least)
    filtered = (mask * rows).swapaxes(2, 3).reshape(spectrum.shape)
    y = np.fft.irfft2(filtered, s=(height, width), norm="ortho") + wide
    return like(x, y.astype(xn.dtype))


def _shrunk(x: NDArray[np.float32], least: float) -> NDArray[np.float32]:
    shrunk: NDArray[np.float32] = np.sign(x) * np.maximum(np.abs(x) - np.float32(least), 0)
    return shrunk


METHOD = Method(
    name="adaptive_frequency_filter",
    family="linear",
    title="Adaptive Frequency Filters As Efficient Global Token Mixers",
    year=2023,
    arxiv="2307.14008",
    function=adaptive_frequency_filter,
    reference=reference.adaptive_frequency_filter,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "A mask of 1 gives twice the map.",
        "A mask within the threshold returns the map.",
        "A constant mask commutes with shifts.",
        "The spectrum's product is the circular convolution with the mask's kernel.",
    ),
    tests="tests/linear/test_adaptive_frequency_filter.py",
    cost="Two transforms per channel, and a complex network of two layers for each frequency.",
)
