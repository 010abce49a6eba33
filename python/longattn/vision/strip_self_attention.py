"""Strip self-attention: pooled keys, and queries and keys of very few channels."""

from __future__ import annotations

from longattn._arrays import Array, reshaped
from longattn._checks import integer, real
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import Linear, Weights, grid, head_count, numbers, optional_linear, returned
from longattn.vision.convolution import depthwise_convolution
from longattn.vision.partition import attend


def strip_self_attention(
    x: Array,
    kernel: Array,
    wq: Weights,
    wk: Weights,
    wv: Weights,
    *,
    heads: int,
    wo: Weights | None = None,
    scale: float = 1.0,
) -> Array:
    """Attention of all places to a grid reduced by a strided depth-wise convolution, with narrow queries and keys.

    In the paper queries and keys have one channel per head (`wq` and `wk` are `[C, heads]`), which makes the scores of
    a head the outer product of two vectors. Their width is not stated beyond doubt, nor the reduction of each stage,
    so both follow the shapes of what is passed.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16.
        kernel: floating `[r, r, C]`: the convolution that reduces the grid by `r`, stride `r`, without padding.
        wq: query weights `[C, heads * D]`, or a pair `(matrix, bias)`; `D = 1` in the paper.
        wk: key weights, likewise, applied to the reduced grid.
        wv: value weights `[C, heads * Dv]`, likewise.
        heads: heads.
        wo: output projection, or `None`.
        scale: factor on the logits.

    Returns:
        `[B, H, W, heads * Dv]`, or as `wo` has it, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(H * W) ** 2 / r ** 2 * heads * (D + Dv)` multiply-adds, and the projections.

    References:
        "S2AFormer: Strip Self-Attention for Efficient Vision Transformer", 2025.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x, kernel = rng.standard_normal((1, 8, 8, 16), dtype=np.float32), np.ones((2, 2, 16), np.float32)
        >>> wq, wk = rng.standard_normal((2, 16, 4), dtype=np.float32)
        >>> longattn.vision.strip_self_attention(x, kernel, wq, wk, np.eye(16), heads=4).shape
        (1, 8, 8, 16)
    """
    xn = grid(x, "x")
    batch, height, width, channels = xn.shape
    taps = numbers(kernel, "kernel", (None, None, channels))
    r = integer(taps.shape[0], "kernel", 1, min(height, width))
    if taps.shape[1] != r:
        raise ValueError(f"kernel: got shape {taps.shape}, expected a square one")
    q_of = Linear.of(wq, "wq", channels)
    k_of = Linear.of(wk, "wk", channels, q_of.outputs)
    v_of = Linear.of(wv, "wv", channels)
    number = head_count(heads, {"wq": q_of.outputs, "wv": v_of.outputs})
    project = optional_linear(wo, "wo", v_of.outputs)
    factor = real(scale, "scale")
    reduced = reshaped(depthwise_convolution(xn, taps, stride=r, padding=0), batch, -1, channels)
    rows = reshaped(xn, batch, -1, channels)
    out = attend(q_of(rows), k_of(reduced), v_of(reduced), heads=number, scale=factor)
    whole = reshaped(out, batch, height, width, -1)
    return returned(x, whole if project is None else project(whole))


METHOD = Method(
    name="strip_self_attention",
    family="vision",
    title="S2AFormer: Strip Self-Attention for Efficient Vision Transformer",
    year=2025,
    arxiv=None,
    function=strip_self_attention,
    reference=reference.strip_self_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Without reduction and with queries of full width it is attention.",
        "Queries of zeros give the mean value.",
        "Equal keys give the mean value.",
    ),
    tests="tests/vision/test_strip_self_attention.py",
    cost="`(H * W) ** 2 / r ** 2 * heads * (D + Dv)` multiply-adds, and the projections.",
)
