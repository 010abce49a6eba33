"""Attention in windows (short distances) and between places an interval apart (long ones)."""

from __future__ import annotations

from longattn._arrays import Array
from longattn._checks import flag, integer, scale_factor
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._inputs import Weights, grid, optional_linear, projections, returned
from longattn.vision.partition import attend_in_groups, pad_ends, padded_to
from longattn.vision.positions import optional_bias


def long_short_distance_attention(
    x: Array,
    wq: Weights,
    wk: Weights,
    wv: Weights,
    *,
    heads: int,
    group: int = 7,
    interval: int = 1,
    adaptive_interval: bool = False,
    wo: Weights | None = None,
    table: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Attention inside groups of `group` x `group` places that lie `interval` apart.

    An interval of 1 gives the short-distance half: windows. A larger one gives the long-distance half: place
    `y = (region * group + g) * interval + i` is number `g` of group `(region, i)`, so neighbours are in different
    groups, and with `H = group * interval` a group spans the image. The two halves, one layer after the other, connect
    all places of such an image if `interval` is at most `group`.

    An image that is no larger than a group along either axis is cut into windows of its shorter side. Others are padded
    after their ends to whole groups; padding is not seen.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16.
        wq: query weights `[C, heads * D]`, or a pair `(matrix, bias)`.
        wk: key weights, likewise.
        wv: value weights `[C, heads * Dv]`, likewise.
        heads: heads.
        group: places of a group per axis.
        interval: from one of a group to its next.
        adaptive_interval: take `ceil(H / group)` and `ceil(W / group)` instead, so that one group spans the image.
        wo: output projection, or `None`.
        table: bias by the difference of places inside their group, floating `[(2 * G - 1) ** 2, heads]` with `G` the
            group (or the shorter side), as `dynamic_position_bias` makes it. `None` is none.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        `[B, H, W, heads * Dv]`, or as `wo` has it, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `H * W * group ** 2 * heads * (D + Dv)` multiply-adds, and the projections; copies by groups.

    References:
        W. Wang et al., "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention", 2021,
        arXiv:2108.00154.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 14, 14, 16), dtype=np.float32)
        >>> wq, wk, wv = rng.standard_normal((3, 16, 16), dtype=np.float32)
        >>> longattn.vision.long_short_distance_attention(x, wq, wk, wv, heads=2, interval=2).shape
        (1, 14, 14, 16)
    """
    xn = grid(x, "x")
    extents = xn.shape[1:3]
    q_of, k_of, v_of, number = projections(xn.shape[3], wq, wk, wv, heads)
    project = optional_linear(wo, "wo", v_of.outputs)
    factor = scale_factor(scale, q_of.outputs // number)
    side, step = integer(group, "group", 1), integer(interval, "interval", 1)
    if flag(adaptive_interval, "adaptive_interval"):
        steps: tuple[int, ...] = tuple(-(-n // side) for n in extents)
    else:
        steps = (step, step)
    if min(extents) <= side:
        side, steps = min(extents), (1, 1)
    bias = optional_bias(table, "table", (side, side), number)
    padded = pad_ends(xn, padded_to(extents, [side * i for i in steps]))
    out = attend_in_groups(
        q_of(padded), k_of(padded), v_of(padded), (side, side),
        heads=number, steps=steps, scale=factor, bias=bias, valid=extents,
    )  # fmt: skip
    out = out[:, : extents[0], : extents[1]]
    return returned(x, out if project is None else project(out))


METHOD = Method(
    name="long_short_distance_attention",
    family="vision",
    title="CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
    year=2021,
    arxiv="2108.00154",
    function=long_short_distance_attention,
    reference=reference.long_short_distance_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "A group no smaller than the image gives attention with the bias.",
        "An interval that makes one region gives attention inside residue classes.",
        "A table of zeros changes nothing.",
        "Short and long distances, one after the other, connect all places.",
    ),
    tests="tests/vision/test_long_short_distance_attention.py",
    cost="`H * W * group ** 2 * heads * (D + Dv)` multiply-adds, and the projections.",
    mask=lambda: layer_seen(long_short_distance_attention, (12, 12), heads=1, group=3, interval=4),
)
