"""Attention of windows to larger windows around them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import flag, integer, one_of, real, scale_factor
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Weights, grid, numbers, optional_linear, projections, returned
from longattn.vision.partition import attend, partition, unpartition
from longattn.vision.positions import relative_position_bias

#: Order of the bias table's rows.
LAYOUTS = ("canonical", "release")


def overlapping_cross_attention(
    x: Array,
    wq: Weights,
    wk: Weights,
    wv: Weights,
    *,
    heads: int,
    window: int = 16,
    overlap: float = 0.5,
    wo: Weights | None = None,
    table: Array | None = None,
    layout: str = "canonical",
    mask_pad: bool = False,
    scale: float | None = None,
) -> Array:
    """Attention of `M` x `M` windows to the `Mo` x `Mo` places around them, `Mo = M + floor(M * overlap)`.

    Args:
        x: grid `[B, H, W, C]`, axes multiples of `window`; float32, float16 or bfloat16.
        wq: query weights `[C, heads * D]`, or a pair `(matrix, bias)`.
        wk: key weights, likewise.
        wv: value weights `[C, heads * Dv]`, likewise.
        heads: heads.
        window: `M`.
        overlap: as above; `Mo - M` is to be even.
        wo: output projection, or `None`.
        table: bias by relative place, floating `[(M + Mo - 1) ** 2, heads]`; `None` is none.
        layout: order of its rows: "canonical": that of `relative_position_bias`; "release": that of the published
            weights, row `(dy + M - Mo + 1) * (M + Mo - 1) + dx + M - Mo + 1` for `dy` and `dx` key less query, each
            counted in its own window; negative rows count from the end.
        mask_pad: places outside the image are not seen; otherwise they are keys and values of zeros, as published.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        `[B, H, W, heads * Dv]`, or as `wo` has it, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `H * W * Mo ** 2 * heads * (D + Dv)` multiply-adds, and the projections; copies of keys and values,
        `(Mo / M) ** 2` times theirs.

    References:
        X. Chen et al., "Activating More Pixels in Image Super-Resolution Transformer", 2022, arXiv:2205.04437.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x, w = rng.standard_normal((1, 8, 8, 16), dtype=np.float32), rng.standard_normal((3, 16, 16))
        >>> longattn.vision.overlapping_cross_attention(x, *w, heads=2, window=4).shape
        (1, 8, 8, 16)
    """
    xn = grid(x, "x")
    batch, height, width, channels = xn.shape
    q_of, k_of, v_of, number = projections(channels, wq, wk, wv, heads)
    side, share = integer(window, "window", 1), real(overlap, "overlap")
    if height % side or width % side:
        raise ValueError(f"window: got {side}, expected a divisor of {height} and {width}")
    if not 0 <= share < np.inf or int(side * share) % 2:
        raise ValueError(f"overlap: got {overlap}, expected at least 0 and an even floor(window * overlap)")
    extra = int(side * share)
    wide = side + extra
    one_of(layout, "layout", LAYOUTS)
    bias = None
    if table is not None:
        rows = numbers(table, "table", ((side + wide - 1) ** 2, number))
        bias = (
            relative_position_bias(rows, (side,) * 2, (wide,) * 2)
            if layout == "canonical"
            else _released(rows, side, wide)
        )
    project = optional_linear(wo, "wo", v_of.outputs)
    factor = scale_factor(scale, q_of.outputs // number)
    mask = None
    if flag(mask_pad, "mask_pad"):
        inside = _around(np.ones((1, height, width, 1), np.float32), side, extra)[..., 0] > 0
        mask = np.broadcast_to(inside, (batch, *inside.shape[1:])).reshape(-1, 1, 1, wide * wide)
    q = partition(q_of(xn), (side, side))
    k, v = (_around(a, side, extra) for a in (k_of(xn), v_of(xn)))
    out = attend(*(a.reshape(-1, *a.shape[2:]) for a in (q, k, v)), heads=number, scale=factor, bias=bias, mask=mask)
    whole = unpartition(reshaped(out, *q.shape[:3], -1), (height, width), (side, side))
    return returned(x, whole if project is None else project(whole))


def _around(x: Float32, side: int, extra: int) -> Float32:
    """The places of each window and around it, zeros outside the grid, `[B, windows, places, C]`."""
    before = extra // 2
    padded = np.pad(x, ((0, 0), (before, before), (before, before), (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(padded, (side + extra,) * 2, axis=(1, 2))
    every = np.moveaxis(views[:, ::side, ::side], 3, -1)
    return reshaped(np.ascontiguousarray(every), len(x), -1, (side + extra) ** 2, x.shape[-1])


def _released(table: Float32, side: int, wide: int) -> Float32:
    """The bias by the rows' order in published weights, `[heads, queries, keys]`."""
    offset = np.arange(wide)[None] - np.arange(side)[:, None] + side - wide + 1
    index: NDArray[np.int64] = reshaped(
        (offset[:, None, :, None] * (side + wide - 1) + offset[None, :, None, :]), side**2, -1
    )
    return np.ascontiguousarray(np.moveaxis(table[index], -1, 0))


METHOD = Method(
    name="overlapping_cross_attention",
    family="vision",
    title="Activating More Pixels in Image Super-Resolution Transformer",
    year=2022,
    arxiv="2205.04437",
    function=overlapping_cross_attention,
    reference=reference.overlapping_cross_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Without overlap it is attention in windows.",
        "Windows of one place with masked padding are a sliding window.",
        "Both orders of the table are rotations of each other.",
    ),
    tests="tests/vision/test_overlapping_cross_attention.py",
    cost="`H * W * Mo ** 2 * heads * (D + Dv)` multiply-adds, and the projections.",
    mask=lambda: layer_seen(overlapping_cross_attention, (12, 12), heads=1, window=4, overlap=0.5),
)
