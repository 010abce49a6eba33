"""Merging of 2 x 2 tokens whose places are moved by predicted offsets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import flag
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, grid, numbers, returned
from longattn.vision.convolution import convolution, gelu
from longattn.vision.sample import sample


def deformable_token_merging(
    x: Array,
    w: Weights,
    *,
    offset_kernel: Array | None = None,
    offset_bias: Array | None = None,
    scale: Array | None = None,
    shift: Array | None = None,
    activation: bool = True,
) -> Array:
    """A grid of half the resolution, from four features each, sampled at their places plus real offsets.

    `y(o) = sum over the four taps k of w_k x(2 o + g_k + d_k(o))`, `g_k` the places of a 2 x 2 cell in row order and
    `d_k` from a 2 x 2 convolution of stride 2; then a batch norm (`scale`, `shift`) and a gelu. Outside the image there
    are zeros. The attention of this model's later stages is `longattn.attention` with a `relative_position_bias`.

    Args:
        x: grid `[B, H, W, C]`, `H` and `W` even; float32, float16 or bfloat16.
        w: weights of the taps `[4 * C, Co]`, or a pair `(matrix, bias)`; the tap is the slower axis.
        offset_kernel: floating `[2, 2, C, 8]`: (y, x) of each tap; `None` is no offsets.
        offset_bias: floating `[8]`.
        scale: floating `[Co]`, of the batch norm, which is folded; `None` is 1.
        shift: floating `[Co]`; `None` is 0.
        activation: whether a gelu follows.

    Returns:
        `[B, H / 2, W / 2, Co]` in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `H * W * C * (Co + 4)` multiply-adds, and the offsets.

    References:
        Z. Pan et al., "Less is More: Pay Less Attention in Vision Transformers", 2021, arXiv:2105.14217.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x, w = rng.standard_normal((1, 4, 6, 8), dtype=np.float32), rng.standard_normal((32, 16))
        >>> longattn.vision.deformable_token_merging(x, w, offset_kernel=np.zeros((2, 2, 8, 8))).shape
        (1, 2, 3, 16)
    """
    xn = grid(x, "x")
    batch, height, width, channels = xn.shape
    if height % 2 or width % 2:
        raise ValueError(f"x: got {height} x {width} places, expected even numbers")
    project = Linear.of(w, "w", 4 * channels)
    kernel = None if offset_kernel is None else numbers(offset_kernel, "offset_kernel", (2, 2, channels, 8))
    added = None if offset_bias is None else numbers(offset_bias, "offset_bias", (8,))
    factors = [
        None if a is None else numbers(a, name, (project.outputs,)) for a, name in ((scale, "scale"), (shift, "shift"))
    ]
    half = (height // 2, width // 2)
    taps = np.array([(0, 0), (0, 1), (1, 0), (1, 1)], np.float32)
    starts = 2 * np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in half), indexing="ij"), axis=-1)
    at = np.broadcast_to(starts[:, :, None] + taps, (batch, *half, 4, 2))
    if kernel is not None:
        at = at + convolution(xn, kernel, stride=2, padding=0, bias=added).reshape(at.shape)
    elif added is not None:
        at = at + added.reshape(4, 2)
    out = project(reshaped(sample(xn, at, coordinates="pixel"), batch, *half, -1))
    if factors[0] is not None:
        out *= factors[0]
    if factors[1] is not None:
        out += factors[1]
    return returned(x, gelu(out) if flag(activation, "activation") else out)


def _example() -> NDArray[np.bool_]:
    """Tokens that each merged token is made of."""
    kernel = np.random.default_rng(0).standard_normal((2, 2, 144, 8))

    def merged(x: Array, w: Float32) -> Array:
        return deformable_token_merging(x, np.tile(w, (4, 1)), offset_kernel=kernel, activation=False)

    return layer_seen(merged, (12, 12), projections=1)


METHOD = Method(
    name="deformable_token_merging",
    family="vision",
    title="Less is More: Pay Less Attention in Vision Transformers",
    year=2021,
    arxiv="2105.14217",
    function=deformable_token_merging,
    reference=reference.deformable_token_merging,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Without offsets it is a 2 x 2 convolution of stride 2.",
        "Offsets of whole places pick other places.",
        "A relative table of zeros leaves the attention of the later stages as it is.",
    ),
    tests="tests/vision/test_deformable_token_merging.py",
    cost="`H * W * C * (Co + 4)` multiply-adds, and the offsets.",
    mask=_example,
    axes=("merged tokens", "tokens"),
)
