"""Neighbourhood attention on grids: windows with dilation, strides and causal axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import flag, integers, returned
from longattn.gpu import generalized_neighborhood_attention as on_gpu
from longattn.gpu import is_on_gpu
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._grid import (
    MOST_AXES,
    attend,
    extra_inputs,
    grid_inputs,
    grid_options,
    own_grid,
    per_axis,
    table_bias,
    window_axes,
)


def generalized_neighborhood_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    extra_k: Array | None = None,
    extra_v: Array | None = None,
    bias: Array | None = None,
    scale: float | Array | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of tokens on a grid of one to three axes to the window of tokens around each.

    A key is visible if it is on every axis. Along an axis of length `X`, token `x` has the place `u = x // dilation`
    among the `n` tokens of its group `x % dilation`, and sees tokens of the group only.

    - Not causal: `window` tokens around the leader `min(stride * (u // stride) + stride // 2, n - 1)` of its stride
      group. At a border the window is moved, not cut: a token always sees `window` tokens. An even window has one more
      token to the left.
    - Causal: the tokens up to its own from `window - 1` before the leader, which is the last of its stride group
      then. A token early in its stride group sees fewer than `window`.

    `stride = 1` is (dilated) neighbourhood attention, or on a causal axis a sliding window; `stride = window` cuts the
    axis into blocks; `window = X` is dense. Each argument is one number for all axes or a tuple.

    Args:
        q: queries `[B, Hq, X1.., D]`, one to three axes; float32, float16 or bfloat16. Arrays `[B, X1.., H, D]` are
            passed as `numpy.moveaxis(q, -2, 1)`, without a copy.
        k: keys `[B, Hkv, X1.., D]`; any of the three dtypes.
        v: values `[B, Hkv, X1.., Dv]`; dtype of `k`.
        window: tokens of a window along each axis.
        stride: tokens that share a window; 1 to `window`.
        dilation: distance between neighbouring tokens of a window; `window * dilation` is at most the length.
        causal: whether tokens behind a token's own are hidden, along each axis.
        extra_k: keys `[B, Hkv, Lx, D]` that every token sees besides, in the same softmax; dtype of `k`.
        extra_v: their values `[B, Hkv, Lx, Dv]`.
        bias: floating `[Hq, 2 w1 - 1, ..]`, added to the logits: the entry `key - query + w - 1` along each axis, in
            units of the dilation.
        scale: factor on the dot products; `None` is `D ** -0.5`. An array `[Hq]`, or `[B, Hq, L]` with the tokens of
            the grid one after another, has one per head or query.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        sinks: floating `[Hq]`: a logit per head without a value.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        The output `[B, Hq, X1.., Dv]`, in the kind and dtype of `q`. With `return_lse`, the pair `(output, lse)`, `lse`
        float32 `[B, Hq, X1..]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a window times its dilation that is longer than the axis, or a stride that
            is larger than the window.

    Cost:
        About 2 `prod(X) * prod(window) * (D + Dv)` multiply-adds per query head, whatever the dilation: tokens that go
        through the matrix kernel together see windows that do not quite agree. Memory is that of the output. An array
        whose axes no single step walks (a crop of a larger grid) costs a copy.

    Arrays of a GPU go to `longattn.gpu`; `extra_k`, `extra_v` and `bias` are not offered there.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 8, 8, 16), dtype=np.float32)
        >>> la.sparse.generalized_neighborhood_attention(q, k, v, window=3).shape
        (1, 2, 8, 8, 16)
    """
    if is_on_gpu(q):
        for name, value in (("extra_k", extra_k), ("extra_v", extra_v), ("bias", bias)):
            if value is not None:
                raise ValueError(f"{name}: not offered for arrays of a GPU")
        return on_gpu(
            q,
            k,
            v,
            window=window,
            stride=stride,
            dilation=dilation,
            causal=causal,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            return_lse=return_lse,
        )
    qn, kn, vn = grid_inputs(q, k, v)
    axes = window_axes(own_grid(qn, kn), window, stride, dilation, causal)
    sizes = per_axis(window, "window", len(axes), 1)
    table = table_bias(bias, qn.shape[1], sizes)
    extra = extra_inputs(extra_k, extra_v, qn, kn, vn)
    options = grid_options(qn.shape, scale, softcap, sinks)
    return_lse = flag(return_lse, "return_lse")
    result, lse = attend(qn, kn, vn, axes, options, bias=table, extra=extra)
    return returned(None, q, result, lse if return_lse else None)


@dataclass(frozen=True, slots=True)
class TileStats:
    """What tiles of tokens meet in neighbourhood attention.

    Attributes:
        visited: pairs of query and key tiles of which some query sees some key's span.
        dense: all pairs of tiles.
        speedup_bound: `dense / visited`, the most that skipping tiles can save.
        flop_bound: tokens over keys per window, the most that skipping keys could save.
        perfectly_block_sparse: whether in every visited pair all queries see all keys, so that no key needs a mask.
    """

    visited: int
    dense: int
    speedup_bound: float
    flop_bound: float
    perfectly_block_sparse: bool


def gna_tile_stats(
    shape: tuple[int, ...],
    *,
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    q_tile: int | tuple[int, ...],
    kv_tile: int | tuple[int, ...],
) -> TileStats:
    """How many pairs of query and key tiles a neighbourhood visits, on a grid cut into tiles of these extents.

    Tiles lie inside the dilation groups. Along an axis a query tile visits the key tiles that overlap the span from the
    first start to the last end of its queries' windows; pairs multiply over the axes. Nothing is computed with, so the
    numbers are those of any machine that works by tiles. Dense tiles are those of the same cut, every group with every
    group.

    Args:
        shape: lengths of one to three axes.
        window: as in `generalized_neighborhood_attention`.
        stride: likewise.
        dilation: likewise.
        causal: likewise.
        q_tile: tokens of a query tile along each axis.
        kv_tile: tokens of a key tile along each axis.

    Raises:
        TypeError: an argument of another kind.
        ValueError: windows that do not fit the grid, or no axis.

    Cost:
        Linear in the sum of the lengths.

    Example:
        >>> import longattn as la
        >>> la.sparse.gna_tile_stats((64, 64), window=16, stride=16, q_tile=8, kv_tile=8).speedup_bound
        16.0
    """
    lengths = integers(shape, "shape", 1)
    if not 1 <= len(lengths) <= MOST_AXES:
        raise ValueError(f"shape: got {len(lengths)} axes, expected 1 to {MOST_AXES}")
    axes = window_axes(lengths, window, stride, dilation, causal)
    q_tiles, kv_tiles = (per_axis(x, n, len(axes), 1) for x, n in ((q_tile, "q_tile"), (kv_tile, "kv_tile")))
    visited, dense, perfect = 1, 1, True
    for axis, q_size, kv_size in zip(axes, q_tiles, kv_tiles, strict=True):
        own = of_queries = of_keys = 0
        for group in range(axis.dilation):
            intervals = axis.intervals[axis.intervals[:, 0] == group].astype(np.int64)
            count, (start, end) = len(intervals), intervals[:, 1:3].T
            firsts = np.arange(0, count, q_size)
            low, high = np.minimum.reduceat(start, firsts), np.maximum.reduceat(end, firsts)
            own += int((-(-high // kv_size) - low // kv_size).sum())
            of_queries, of_keys = of_queries + len(firsts), of_keys + -(-count // kv_size)
            # All queries of a tile see whole key tiles if their windows agree and end where key tiles do.
            same = (low == np.maximum.reduceat(start, firsts)) & (high == np.minimum.reduceat(end, firsts))
            whole = (low % kv_size == 0) & ((high % kv_size == 0) | (high == count))
            perfect &= bool((same & whole).all())
        visited, dense = visited * own, dense * of_queries * of_keys
    flop_bound = math.prod(lengths) / math.prod(per_axis(window, "window", len(axes), 1))
    return TileStats(visited, dense, dense / visited, flop_bound, perfect)


def visible_tokens(
    shape: tuple[int, ...],
    *,
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> NDArray[np.bool_]:
    """Which keys each query of `generalized_neighborhood_attention` sees, for small grids.

    Args:
        shape: lengths of one to three axes.
        window: as in `generalized_neighborhood_attention`.
        stride: likewise.
        dilation: likewise.
        causal: likewise.

    Returns:
        `[L, L]`, tokens of the grid one after another with the last axis fastest.

    Raises:
        TypeError: an argument of another kind.
        ValueError: windows that do not fit the grid, or no axis.
    """
    lengths = integers(shape, "shape", 1)
    if not 1 <= len(lengths) <= MOST_AXES:
        raise ValueError(f"shape: got {len(lengths)} axes, expected 1 to {MOST_AXES}")
    mask = np.ones((1, 1), bool)
    for axis in window_axes(lengths, window, stride, dilation, causal):
        group, start, end = (axis.intervals[:, n, None].astype(np.int64) for n in range(3))
        key = np.arange(axis.keys)
        place = key // axis.dilation
        mask = np.kron(mask, (key % axis.dilation == group) & (start <= place) & (place < end))
    return mask


METHOD = Method(
    name="generalized_neighborhood_attention",
    family="sparse",
    title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    year=2025,
    arxiv="2504.16922",
    function=generalized_neighborhood_attention,
    reference=reference.generalized_neighborhood_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "A stride of 1 is (dilated) neighbourhood attention.",
        "A stride that equals the window and divides the axis is attention inside blocks.",
        "A window as long as the axis is dense attention, on one causal axis dense causal attention.",
        "A causal axis with a stride of 1 is a sliding window.",
        "A dilation that divides the axis is undilated attention on the interleaved sub-grids.",
        "Windows are the rule's for all windows, strides, dilations and causal axes of small grids.",
    ),
    tests="tests/sparse/test_generalized_neighborhood_attention.py",
    cost="About `2 * prod(X) * prod(window) * (D + Dv)` multiply-adds per query head.",
    mask=lambda: seen(generalized_neighborhood_attention, *example(144), shape=(12, 12), window=5, stride=2),
)
