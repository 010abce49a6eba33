"""Attention to a block's own tokens and to merged tokens of earlier blocks."""

from __future__ import annotations

import numpy as np

from longattn._arrays import Array, reshaped
from longattn._checks import flag, scale_factor
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import (
    Float32,
    Weights,
    features,
    grid,
    layer_norm,
    norm_weights,
    numbers,
    optional_linear,
    projections,
    returned,
)
from longattn.vision.convolution import depthwise_convolution
from longattn.vision.partition import attend
from longattn.vision.positions import absolute_offset_bias


def forward_cross_attention(
    x: Array,
    cross: Array,
    wq: Weights,
    wk: Weights,
    wv: Weights,
    *,
    heads: int,
    wo: Weights | None = None,
    offset_table: Array | None = None,
    cross_bias: Array | None = None,
    cross_scale: Array | None = None,
    cross_norm: tuple[Array, Array] | None = None,
    scale_after_norm: bool = False,
    scale: float | None = None,
) -> Array:
    """Self-attention of an image whose keys are its own tokens and `cross`, which earlier blocks of the stage left.

    Cross tokens, as `merge_tokens` makes them, are multiplied by a learned factor each, normalised and projected by the
    same `wk` and `wv`; own tokens have a bias by `|dy|` and `|dx|`, cross tokens one of their own. One softmax. The
    published code scales before the norm, which takes the factors away again but for their signs;
    `scale_after_norm` scales after it.

    Args:
        x: grid `[B, H, W, C]`, normalised as the layer needs it; float32, float16 or bfloat16.
        cross: cross tokens `[B, Ns, C]`, likewise; `Ns` may be 0.
        wq: query weights `[C, heads * D]`, or a pair `(matrix, bias)`.
        wk: key weights, likewise.
        wv: value weights `[C, heads * Dv]`, likewise.
        heads: heads.
        wo: output projection, or `None`.
        offset_table: floating `[heads, H * W]`, entry `|dy| * W + |dx|`; `None` is none.
        cross_bias: floating `[heads, Ns]`, -inf for a token that is not seen; `None` is none.
        cross_scale: floating `[Ns]`; `None` is 1.
        cross_norm: `(weight, bias)` of a layer norm of the cross tokens; `None` is none.
        scale_after_norm: see there.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        `[B, H, W, heads * Dv]`, or as `wo` has it, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `N * (N + Ns) * heads * (D + Dv)` multiply-adds for `N = H * W`, and the projections.

    References:
        H. Zhang et al., "Fcaformer: Forward Cross Attention in Hybrid Vision Transformer", 2022, arXiv:2211.07198.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x, cross = rng.standard_normal((1, 8, 8, 16), dtype=np.float32), np.ones((1, 4, 16), np.float32)
        >>> w = rng.standard_normal((3, 16, 16), dtype=np.float32)
        >>> longattn.vision.forward_cross_attention(x, cross, *w, heads=2).shape
        (1, 8, 8, 16)
    """
    xn = grid(x, "x")
    batch, height, width, channels = xn.shape
    tokens = features(cross, "cross", 3, "[B, Ns, C]", (batch, None, channels))
    count = tokens.shape[1]
    q_of, k_of, v_of, number = projections(channels, wq, wk, wv, heads)
    project = optional_linear(wo, "wo", v_of.outputs)
    factor, after = scale_factor(scale, q_of.outputs // number), flag(scale_after_norm, "scale_after_norm")
    factors = None if cross_scale is None else numbers(cross_scale, "cross_scale", (count,))[:, None]
    norm = None if cross_norm is None else norm_weights(cross_norm, "cross_norm", channels)
    bias = _bias(offset_table, cross_bias, number, (height, width), count)
    if factors is not None and not after:
        tokens = tokens * factors
    if norm is not None:
        tokens = layer_norm(tokens, *norm)
    if factors is not None and after:
        tokens = tokens * factors
    rows = reshaped(xn, batch, -1, channels)
    keys = np.concatenate([rows, tokens], axis=1)
    out = reshaped(attend(q_of(rows), k_of(keys), v_of(keys), heads=number, scale=factor, bias=bias), *xn.shape[:3], -1)
    return returned(x, out if project is None else project(out))


def merge_tokens(x: Array, kernel: Array, *, stride: int = 4, bias: Array | None = None) -> Array:
    """Cross tokens of a block's output: a strided depth-wise convolution.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16.
        kernel: floating `[k, k, C]`; the paper's is 7 x 7.
        stride: places from one token to the next.
        bias: floating `[C]`, added.

    Returns:
        `[B, Ns, C]`, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `k ** 2 * C` multiply-adds per token.
    """
    xn = grid(x, "x")
    merged = depthwise_convolution(xn, kernel, stride=stride, bias=bias)
    return returned(x, reshaped(merged, len(xn), -1, xn.shape[-1]))


def _bias(table: Array | None, cross: Array | None, heads: int, shape: tuple[int, int], count: int) -> Float32 | None:
    """`[heads, N, N + Ns]`."""
    if table is None and cross is None:
        return None
    places = shape[0] * shape[1]
    bias = np.zeros((heads, places, places + count), np.float32)
    if table is not None:
        bias[:, :, :places] = absolute_offset_bias(numbers(table, "offset_table", (heads, places)), shape)
    if cross is not None:
        bias[:, :, places:] = numbers(cross, "cross_bias", (heads, count))[:, None]
    return bias


METHOD = Method(
    name="forward_cross_attention",
    family="vision",
    title="Fcaformer: Forward Cross Attention in Hybrid Vision Transformer",
    year=2022,
    arxiv="2211.07198",
    function=forward_cross_attention,
    reference=reference.forward_cross_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=False,
    step=False,
    checks=(
        "Without cross tokens it is self-attention, and so it is where their bias is -inf.",
        "Cross tokens that are the own tokens change nothing without a table.",
    ),
    tests="tests/vision/test_forward_cross_attention.py",
    cost="`N * (N + Ns) * heads * (D + Dv)` multiply-adds for `N = H * W`, and the projections.",
)
