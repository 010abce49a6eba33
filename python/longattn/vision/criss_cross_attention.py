"""Criss-cross attention: each place attends to the lines through it."""

from __future__ import annotations

import numpy as np

from longattn._arrays import Array, reshaped
from longattn._checks import finite, integer, scale_factor
from longattn.dense.merge import merge
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, grid, returned
from longattn.vision.partition import attend


def criss_cross_attention(
    x: Array, wq: Weights, wk: Weights, wv: Weights, *, gamma: float = 1.0, scale: float = 1.0, rounds: int = 2
) -> Array:
    """Attention of each place of a grid to all places that share all of its coordinates but one.

    In an image these are the place's row and column, in a video its three lines. They share one softmax, in which the
    place itself counts once. `x` becomes `gamma * attention + x`; this is done `rounds` times with the same weights:
    after two rounds every place of an image has been reached by every other.

    Args:
        x: grid `[B, X1, .., Xn, C]`, n = 1 to 3; float32, float16 or bfloat16.
        wq: query weights `[C, Cq]`, or a pair `(matrix, bias)`; the paper has `Cq = C / 8`.
        wk: key weights, likewise.
        wv: value weights `[C, C]`, or a pair.
        gamma: factor on the attention; a layer learns it from 0 on.
        scale: factor on the logits; the paper has none.
        rounds: how often.

    Returns:
        The grid, in the shape, kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `N * (X1 + .. + Xn) * (Cq + C)` multiply-adds per round for `N` places, and the projections. Lines along all
        axes but the last are copies.

    References:
        Z. Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", 2018, arXiv:1811.11721.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 6, 7, 16), dtype=np.float32)
        >>> wq, wk = rng.standard_normal((2, 16, 2), dtype=np.float32)
        >>> longattn.vision.criss_cross_attention(x, wq, wk, np.eye(16, dtype=np.float32)).shape
        (1, 6, 7, 16)
    """
    now = grid(x, "x", (1, 2, 3))
    channels = now.shape[-1]
    q_of = Linear.of(wq, "wq", channels)
    k_of = Linear.of(wk, "wk", channels, q_of.outputs)
    v_of = Linear.of(wv, "wv", channels, channels)
    factor, weight = scale_factor(scale, q_of.outputs), np.float32(finite(gamma, "gamma"))
    for _ in range(integer(rounds, "rounds", 1)):
        q, k, v = q_of(now), k_of(now), v_of(now)
        axes = range(now.ndim - 2, 0, -1)
        parts = [_along(axis, q, k, v, factor, with_self=axis == now.ndim - 2) for axis in axes]
        out = parts[0][0] if len(parts) == 1 else merge(parts)[0]
        now = weight * out.reshape(now.shape) + now
    return returned(x, now)


def _along(axis: int, q: Float32, k: Float32, v: Float32, scale: float, *, with_self: bool) -> tuple[Float32, Float32]:
    """Attention inside the lines along an axis: output `[B, 1, N, C]` and lse `[B, 1, N]`."""
    lines = [np.moveaxis(x, axis, -2) for x in (q, k, v)]
    length = q.shape[axis]
    mask = None if with_self else ~np.eye(length, dtype=bool)
    out, lse = attend(
        *(x.reshape(-1, length, x.shape[-1]) for x in lines), heads=1, scale=scale, mask=mask, return_lse=True
    )
    placed = np.moveaxis(out.reshape(lines[2].shape), -2, axis)
    sums = np.moveaxis(lse.reshape(lines[2].shape[:-1]), -1, axis)
    batch = len(q)
    rows = reshaped(np.ascontiguousarray(placed), batch, 1, -1, v.shape[-1])
    return rows, reshaped(np.ascontiguousarray(sums), batch, 1, -1)


METHOD = Method(
    name="criss_cross_attention",
    family="vision",
    title="CCNet: Criss-Cross Attention for Semantic Segmentation",
    year=2018,
    arxiv="1811.11721",
    function=criss_cross_attention,
    reference=reference.criss_cross_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "A grid of one column, or of one row, gives attention along the line.",
        "With `gamma = 0` it returns `x`.",
        "Where all values are equal it returns `x + gamma * v`.",
        "One round reaches the lines through a place and nothing else, two rounds everything.",
    ),
    tests="tests/vision/test_criss_cross_attention.py",
    cost="`N * (X1 + .. + Xn) * (Cq + C)` multiply-adds per round for `N` places, and the projections.",
    mask=lambda: layer_seen(criss_cross_attention, (12, 12), rounds=1),
    shown="one round",
)
