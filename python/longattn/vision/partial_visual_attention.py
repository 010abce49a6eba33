"""A convolution of some channels, and gates or attention of the others."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import integer, one_of, real
from longattn.methods import Method
from longattn.pictures import changed
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, grid, odd_kernel, optional_linear, projections, returned
from longattn.vision.convolution import convolution
from longattn.vision.partition import attend

Mode = Literal["channel", "gaussian", "spatial", "attention"]


def partial_visual_attention(
    x: Array,
    split: int,
    mode: Mode,
    weights: Any,
    *,
    kernel: Array | None = None,
    heads: int = 1,
    bias: Array | None = None,
    wo: Weights | None = None,
) -> Array:
    """The first channels `x1` are convolved, the others `x2` attended to; both side by side, then `wo`.

    What becomes of `x2` depends on `mode`:

    - "channel": `x2 * sigmoid([mean ; deviation] w + b)`, mean and deviation of each channel over the places;
    - "gaussian": `x2 * exp(-z ** 2 / (2 c ** 2))`, `z` the channels' means, normalised over channels;
    - "spatial": `x2 * hard_sigmoid(x2 w + b)`, a number per place, `hard_sigmoid(t) = clip((t + 3) / 6, 0, 1)`;
    - "attention": multi-head self-attention of all places.

    Which form the channels' gate has in the paper is not stated beyond doubt, hence the first two.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16.
        split: channels of `x1`, 0 to `C`.
        mode: see above.
        weights: "channel": `[2 * C2, C2]`, or a pair `(matrix, bias)`; "gaussian": the number `c`, above 0; "spatial":
            `[C2, 1]`, or a pair; "attention": `(wq, wk, wv)` from `C2` channels, `wv` to `C2`. Not looked at without
            `x2`.
        kernel: floating `[kh, kw, split, split]`, odd sizes, zeros outside; `None` leaves `x1`.
        heads: heads of "attention".
        bias: of "attention", floating, broadcastable to `[heads, H * W, H * W]`; see `relative_position_bias`.
        wo: projection of all channels, or `None`.

    Returns:
        `[B, H, W, C]`, or as `wo` has it, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `H * W * kh * kw * split ** 2` multiply-adds; gates `H * W * C2`, attention `(H * W) ** 2` times `D + Dv`.

    References:
        H. Huang et al., "Partial Convolution Meets Visual Attention", 2025, arXiv:2503.03148.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x, kernel = rng.standard_normal((1, 8, 8, 16), dtype=np.float32), rng.standard_normal((3, 3, 4, 4))
        >>> longattn.vision.partial_visual_attention(x, 4, "gaussian", 2.0, kernel=kernel).shape
        (1, 8, 8, 16)
    """
    xn = grid(x, "x")
    channels = xn.shape[-1]
    first = integer(split, "split", 0, channels)
    one_of(mode, "mode", get_args(Mode))
    if bias is not None and mode != "attention":
        raise ValueError(f"bias: got one with mode {mode!r}, expected none")
    taps = None if kernel is None else odd_kernel(kernel, "kernel", (None, None, first, first))
    one, two = xn[..., :first], xn[..., first:]
    if two.shape[-1]:
        two = _attended(two, mode, weights, heads, bias)
    project = optional_linear(wo, "wo", channels)
    if taps is not None and first:
        one = convolution(one, taps)
    out = np.concatenate([one, two], axis=-1)
    return returned(x, out if project is None else project(out))


def _attended(x: Float32, mode: Mode, weights: Any, heads: int, bias: Array | None) -> Float32:
    """What becomes of the other channels."""
    channels = x.shape[-1]
    rows = reshaped(x, len(x), -1, channels)
    if mode == "attention":
        if not isinstance(weights, tuple | list) or len(weights) != 3:
            raise TypeError(f"weights: got {type(weights).__name__}, expected (wq, wk, wv)")
        wq, wk, wv = weights
        q_of, k_of, v_of, number = projections(channels, wq, wk, wv, heads)
        if v_of.outputs != channels:
            raise ValueError(f"weights: got {v_of.outputs} channels of wv, expected {channels}")
        out: Float32 = attend(q_of(rows), k_of(rows), v_of(rows), heads=number, bias=bias).reshape(x.shape)
        return out
    if mode == "spatial":
        gate = np.clip((Linear.of(weights, "weights", channels, 1)(x) + np.float32(3)) / np.float32(6), 0, 1)
        return np.asarray(x * gate, np.float32)
    mean = rows.mean(axis=1, dtype=np.float64)
    if mode == "channel":
        linear = Linear.of(weights, "weights", 2 * channels, channels)
        moments = np.concatenate([mean, np.sqrt(np.square(rows - mean[:, None]).mean(axis=1))], axis=-1)
        factor = np.asarray(1 / (1 + np.exp(-linear(moments.astype(np.float32)))), np.float32)
    else:
        spread = real(weights, "weights")
        if spread <= 0:
            raise ValueError(f"weights: got {weights}, expected a number above 0")
        z = mean - mean.mean(axis=-1, keepdims=True)
        z /= np.sqrt(np.square(z).mean(axis=-1, keepdims=True) + 1e-5)
        factor = np.asarray(np.exp(-np.square(z) / (2 * spread**2)), np.float32)
    gated: Float32 = x * factor[:, None, None]
    return gated


def _example() -> NDArray[np.bool_]:
    """What 64 places see in their convolved channels, and then in those that are attended to."""
    rng = np.random.default_rng(0)
    weights, kernel = tuple(0.5 * rng.standard_normal((3, 4, 4))), rng.standard_normal((3, 3, 4, 4))

    def layer(x: Float32) -> Float32:
        image = np.concatenate(np.split(x, 2), axis=1).reshape(1, 8, 8, 8)
        out = np.asarray(partial_visual_attention(image, 4, "attention", weights, kernel=kernel)).reshape(64, 8)
        return np.concatenate(np.split(out, 2, axis=1))

    return changed(layer, 128)


METHOD = Method(
    name="partial_visual_attention",
    family="vision",
    title="Partial Convolution Meets Visual Attention",
    year=2025,
    arxiv="2503.03148",
    function=partial_visual_attention,
    reference=reference.partial_visual_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "A gate of 1 leaves the other channels: a partial convolution.",
        "A split of all channels is a convolution.",
        "A split of none is attention of all places.",
    ),
    tests="tests/vision/test_partial_visual_attention.py",
    cost="`H * W * kh * kw * split ** 2` multiply-adds; gates `H * W * C2`, attention `(H * W) ** 2 * (D + Dv)`.",
    mask=_example,
    axes=("places of both parts", "places of both parts"),
    shown='mode "attention"',
)
