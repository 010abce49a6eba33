"""VMoBA: blocks of video tokens, cut along time or space, chosen for queries by the means of their keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like
from longattn._checks import (
    batched,
    dense_inputs,
    finite,
    flag,
    integer,
    one_of,
    real,
    scale_factor,
    sequence_bounds,
)
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._choosing import block_mass, choose
from longattn.sparse._lists import pointers
from longattn.sparse._selecting import block_bounds, block_means, selector_inputs
from longattn.sparse.block_mask import BlockMask, fitted
from longattn.sparse.block_sparse_attention import block_sparse_attention
from longattn.sparse.sparse_attention import SparseStats

#: Over what a threshold is taken: for each head, for each query, for each block, or for all heads together.
SCOPES = ("head", "query", "block", "all")


def vmoba_partition(grid: tuple[int, int, int], partition: float | tuple[int, ...]) -> tuple[NDArray[np.int64], int]:
    """The order of tokens in which blocks are contiguous, and the tokens of a block.

    Args:
        grid: frames (0 in a video without tokens), and rows and columns of a frame; tokens are numbered in this order.
        partition: a number of frames, which may be a fraction: blocks of that many tokens one after another; `(height,
            width)`: patches of that size through all frames; or `(frames, height, width)`.

    Returns:
        `(order, size)`: `order` `[L]`, the token at each place, and the tokens of a block, of the last one at most.

    Raises:
        TypeError: arguments of another kind.
        ValueError: sizes below 1, or that do not divide the grid.

    Example:
        >>> import longattn as la
        >>> order, size = la.sparse.vmoba_partition((1, 2, 4), (2, 2))
        >>> order.tolist(), size
        ([0, 1, 4, 5, 2, 3, 6, 7], 4)
    """
    frames, height, width = extents = _extents(grid)
    sizes = _sizes(partition)
    if isinstance(sizes, float):
        size = int(sizes * height * width)
        if size < 1:
            raise ValueError(f"partition: got {partition}, expected blocks of at least one token")
        tokens = np.arange(frames * height * width)
        return tokens, min(size, max(len(tokens), 1))
    t, h, w = of_block = (max(frames, 1), *sizes) if len(sizes) == 2 else sizes
    if any(n % part for n, part in zip(extents, of_block, strict=True)):
        raise ValueError(f"partition: got {partition!r}, expected divisors of the grid {extents}")
    tokens = np.arange(frames * height * width)
    cut = tokens.reshape(frames // t, t, height // h, h, width // w, w).transpose(0, 2, 4, 1, 3, 5)
    return cut.ravel(), t * h * w


def _extents(grid: object) -> tuple[int, int, int]:
    """A checked grid."""
    if not isinstance(grid, tuple | list) or len(grid) != 3:
        raise TypeError(f"grid: got {grid!r}, expected (frames, height, width)")
    return integer(grid[0], "grid", 0), integer(grid[1], "grid", 1), integer(grid[2], "grid", 1)


def _sizes(partition: object) -> float | tuple[int, ...]:
    """A checked partition, whatever the grid: a number of frames, or two or three sizes."""
    if not isinstance(partition, tuple | list):
        return finite(partition, "partition")
    if len(partition) not in (2, 3):
        raise ValueError(f"partition: got {partition!r}, expected a number, (height, width) or (frames, height, width)")
    return tuple(integer(x, "partition", 1) for x in partition)


def vmoba_blocks(
    q: Array,
    k: Array,
    *,
    block: int,
    tau: float = 0.25,
    top_k: int | None = None,
    scope: str = "head",
    min_extra: int = 1,
) -> BlockMask:
    """The blocks that each query takes, for tokens whose blocks of `block` follow one another.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, L, D]`, or `[Hkv, L, D]`; any of the three dtypes.
        block: tokens of a block.
        tau: as in `vmoba_select`.
        top_k: as in `vmoba_select`.
        scope: as in `vmoba_select`.
        min_extra: as in `vmoba_select`.

    Returns:
        The mask, with query blocks of one query.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.
    """
    qn, kn = selector_inputs(q, k)
    batch, heads, rows, _ = qn.shape
    if kn.shape[2] != rows:
        raise ValueError(f"k: got {kn.shape[2]} tokens, expected {rows} as in q")
    block = integer(block, "block", 1)
    top_k, min_extra = _checked_rule(tau, top_k, scope, min_extra)
    bounds = block_bounds(rows, block)
    count = len(bounds) - 1
    gate = block_mass(qn, block_means(kn, bounds), 1.0, limits=np.full(rows, count), weigh=False)
    own = np.arange(rows) // block
    rule: dict[str, Any] = {"share": tau, "others": min_extra, "spread": True}
    if top_k is not None:
        most = min(top_k, count) * (1 if scope == "query" else rows)
        rule = {"least": most, "most": most}
    if scope == "block":
        # One row for each block, over the queries of all heads.
        turned = np.ascontiguousarray(gate.transpose(0, 3, 1, 2)).reshape(batch, 1, count, heads * rows)
        mine = np.tile(own, heads) == np.arange(count)[:, None]
        indptr, indices = choose(turned, np.full(count, heads * rows), marks=mine[None, None], **rule)
        blocks = np.repeat(np.tile(np.arange(count), batch), np.diff(indptr.reshape(batch, -1), axis=1).ravel())
        batches = np.repeat(np.arange(batch), indptr[:, 0, -1] - indptr[:, 0, 0])
        codes = np.sort((batches * heads * rows + indices.astype(np.int64)) * count + blocks)
        shape = (batch, heads, rows)
        lists = pointers(codes // max(count, 1), shape), (codes % max(count, 1)).astype(np.uint32)
    else:
        together = {"query": 1, "head": rows, "all": heads * rows}[scope]
        lists = choose(gate, np.full(rows, count), forced=(own, own + 1), together=max(together, 1), **rule)
    return BlockMask(
        indptr=lists[0], indices=lists[1], **fitted((rows, rows), 1, block),
        scored=batch * heads * rows * count,
    )  # fmt: skip


def _checked_rule(tau: object, top_k: object, scope: str, min_extra: object) -> tuple[int | None, int]:
    """`top_k` and `min_extra` as Python's own, of arguments that fit each other."""
    if not real(tau, "tau") >= 0:
        raise ValueError(f"tau: got {tau}, expected at least 0")
    one_of(scope, "scope", SCOPES)
    most = None if top_k is None else integer(top_k, "top_k", 1)
    if most is not None and scope not in ("head", "query"):
        raise ValueError(f"scope: got {scope!r} with top_k, expected 'head' or 'query'")
    return most, integer(min_extra, "min_extra", 0)


def vmoba_select(
    q: Array,
    k: Array,
    v: Array,
    *,
    grid: tuple[int, int, int] | Sequence[tuple[int, int, int]],
    partition: float | tuple[int, ...],
    cu_seqlens: Array | None = None,
    tau: float = 0.25,
    top_k: int | None = None,
    scope: str = "head",
    min_extra: int = 1,
    scale: float | None = None,
    return_stats: bool = False,
) -> Any:
    """Attention of video tokens to their own block and to the blocks whose mean key they like best.

    The gate of a query and a block is `q . mean k`. Over a scope gates are moved and scaled to 0 to 1; a query's own
    block is always taken, and of all other pairs of the scope the best, until those that are taken have a share `tau`
    of the sum, but at least `min_extra`. With `top_k` instead, a query takes its `top_k` best blocks (scope "query"),
    or a head the `top_k * L` best pairs (scope "head"); own blocks count.

    Layers of the original go through partitions along time, in the plane and in space by turns. Sequences of a batch
    have one length; sequences of several lengths lie one after another (`cu_seqlens`). Blocks and scopes are of one
    sequence, so that each has the result that it has alone.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16; `L = frames * height * width`.
        k: keys `[B, Hkv, L, D]`, or `[Hkv, L, D]`; any of the three dtypes.
        v: values `[B, Hkv, L, Dv]`, or `[Hkv, L, Dv]`; dtype of `k`.
        grid: frames, and rows and columns of a frame; with `cu_seqlens` one such triple for each sequence.
        partition: how tokens are cut into blocks, see `vmoba_partition`.
        cu_seqlens: bounds `[S + 1]` of sequences that a batch of 1 holds one after another; `None` is one sequence for
            each of the batch.
        tau: share of the scope's sum, from 1 on all.
        top_k: instead of `tau`, numbers of blocks.
        scope: "head", "query", "block" (for each block, over the queries of all heads) or "all" (all heads together).
        min_extra: pairs of a scope besides own blocks that are taken at least.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_stats: also return `SparseStats`.

    Returns:
        The output `[B, Hq, L, Dv]` (or `[Hq, L, Dv]`), in the kind and dtype of `q`; with `return_stats` the pair
        `(output, stats)`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Per query head `L * blocks * D` multiply-adds for the gates and a partial order of them, and `(D + Dv)` per
        query and key of the blocks it takes; for partitions in the plane or in space, copies in the blocks' order.
        With `cu_seqlens`, calls of the kernels for each sequence.

    References:
        J. Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", 2025, arXiv:2506.23858.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4 * 8 * 8, 16), dtype=np.float32)
        >>> out, stats = la.sparse.vmoba_select(q, k, v, grid=(4, 8, 8), partition=(4, 4), return_stats=True)
        >>> stats.density < 0.6
        True
    """
    q3, k3, v3 = dense_inputs(q, k, v)
    qn, kn = selector_inputs(q3, k3)
    vn, return_stats = batched(v3, 4), flag(return_stats, "return_stats")
    factor = scale_factor(scale, qn.shape[3])
    _checked_rule(tau, top_k, scope, min_extra)
    parts = _parts(grid, partition, qn.shape, kn.shape[2], cu_seqlens)
    out = np.empty((*qn.shape[:3], vn.shape[3]), qn.dtype)
    moved, stats = isinstance(partition, tuple | list), []
    for rows, order, size in parts:
        own = [x[:, :, rows] for x in (qn, kn, vn, out)]
        own_q, own_k, own_v = (np.take(x, order, axis=2) if moved else x for x in own[:3])
        mask = vmoba_blocks(own_q, own_k, block=size, tau=tau, top_k=top_k, scope=scope, min_extra=min_extra)
        found = block_sparse_attention(own_q, own_k, own_v, mask, scale=factor, out=None if moved else own[3])
        if moved:
            own[3][:, :, order] = found
        if return_stats:
            stats.append(SparseStats.of(mask, causal=False))
    result = like(q, out.reshape(*q3.shape[:-1], vn.shape[3]))
    if not return_stats:
        return result
    scored, attended, nbytes = (sum(getattr(x, name) for x in stats) for name in ("scored", "attended", "nbytes"))
    every = qn.shape[0] * qn.shape[1] * sum(len(order) ** 2 for _, order, _ in parts)
    share = attended / every if every else 0.0
    return result, SparseStats(scored=scored, attended=attended, density=share, nbytes=nbytes)


def _parts(
    grid: object, partition: Any, shape: tuple[int, ...], keys: int, cu_seqlens: Array | None
) -> list[tuple[slice, NDArray[np.int64], int]]:
    """The tokens of each sequence, their order by blocks, and the tokens of a block."""
    tokens = shape[2]
    if keys != tokens:
        raise ValueError(f"k: got {keys} tokens, expected {tokens} as in q")
    if cu_seqlens is None:
        return [_part(grid, partition, 0, tokens, f"{tokens} tokens")]
    if shape[0] != 1:
        raise ValueError(f"cu_seqlens: got it with a batch of {shape[0]}, expected 1, which holds all sequences")
    bounds = sequence_bounds(cu_seqlens, "cu_seqlens", tokens).tolist()
    if not isinstance(grid, Sequence) or not all(isinstance(own, tuple | list) for own in grid):
        raise TypeError(f"grid: got {grid!r} with cu_seqlens, expected (frames, height, width) of each sequence")
    if len(grid) != len(bounds) - 1:
        raise ValueError(f"grid: got {len(grid)} with cu_seqlens, expected {len(bounds) - 1}, one per sequence")
    _sizes(partition)  # where there is no sequence, too
    return [
        _part(own, partition, first, last, f"the {last - first} tokens of sequence {n}")
        for n, (own, (first, last)) in enumerate(zip(grid, pairwise(bounds), strict=True))
    ]


def _part(grid: object, partition: Any, first: int, last: int, whose: str) -> tuple[slice, NDArray[np.int64], int]:
    """One sequence's tokens from `first` to `last`, in a grid of as many."""
    extents = _extents(grid)
    if math.prod(extents) != last - first:
        raise ValueError(f"grid: got {extents} for {whose}, expected as many")
    return slice(first, last), *vmoba_partition(extents, partition)


METHOD = Method(
    name="vmoba_select",
    family="sparse",
    title="VMoBA: Mixture-of-Block Attention for Video Diffusion Models",
    year=2025,
    arxiv="2506.23858",
    function=vmoba_select,
    reference=reference.vmoba_select,
    exact=False,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "With `tau` 1, or as many blocks as there are, it is dense attention.",
        "With a single block it is dense attention.",
        "With `tau` 0 and no extra pair it is attention inside blocks.",
        "With a number of blocks for each query it is MoBA without causality.",
        "The result does not depend on the order of the blocks.",
        "A sequence among others is that sequence alone.",
    ),
    tests="tests/sparse/test_vmoba_select.py",
    cost="`L * blocks * D` multiply-adds per query head for the gates, `(D + Dv)` per query and key of what is taken.",
    mask=lambda: seen(vmoba_select, *example(), grid=(4, 4, 8), partition=(2, 2, 4), tau=0.4),
)
