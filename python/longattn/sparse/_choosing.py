"""Scores of blocks, and what is best by them: the compiled functions with arrays of many heads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn.sparse._lists import from_flat
from longattn.sparse._selecting import block_means

Bounds = NDArray[np.int64]

#: More entries than there are in any row.
ALL = 2**62


def block_mass(
    q: NDArray[Any],
    k: NDArray[Any],
    scale: float,
    *,
    limits: Bounds,
    row_bounds: Bounds | None = None,
    blocks: tuple[Bounds, Bounds] | None = None,
    shifts: int = 1,
    weigh: bool = True,
    shared: bool = False,
) -> NDArray[np.float32]:
    """Softmax weights (or logits) of `q` over `k`, summed over blocks of rows and of keys, `[B, H, blocks, blocks]`.

    Row `i` sees the keys before `limits[i]`. Single rows and single keys where no bounds are given; with `shared`,
    sums over the query heads of a KV head.
    """
    batch, heads, rows, _ = q.shape
    row_bounds = np.arange(rows + 1) if row_bounds is None else row_bounds
    starts, ends = (np.arange(k.shape[2]), np.arange(1, k.shape[2] + 1)) if blocks is None else blocks
    sums = _core.block_mass(
        q,
        k,
        scale,
        np.ascontiguousarray(row_bounds, np.int64),
        (np.ascontiguousarray(starts, np.int64), np.ascontiguousarray(ends, np.int64)),
        np.ascontiguousarray(limits, np.int64),
        shifts,
        weigh,
        shared,
    )
    return sums.reshape(batch, k.shape[1] if shared else heads, len(row_bounds) - 1, len(starts))


def choose(
    scores: NDArray[np.float32],
    limits: Bounds,
    *,
    forced: tuple[Bounds, Bounds] | None = None,
    sinks: int = 0,
    marks: NDArray[np.bool_] | None = None,
    share: NDArray[np.float32] | float = 0.0,
    least: int = 0,
    most: int = ALL,
    counts: bool = True,
    others: int = 0,
    together: int = 1,
    spread: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """The best entries of each row of `scores` `[B, H, rows, columns]`, as `indptr` `[B, H, rows + 1]` and `indices`.

    Args:
        scores: at least 0, but with `spread`.
        limits: `[rows]`: a row's entries below are eligible.
        forced: `[rows]` each: entries from the first to before the second are taken whatever they score.
        sinks: first entries that are, too.
        marks: further ones, as `scores`.
        share: for all, or for each head: what is taken has at least this share of the sum over the scope.
        least: as many entries of a scope are taken at least,
        most: and at most, but for the forced ones.
        counts: whether forced entries count to share and numbers; else the best come besides.
        others: at least so many that are not forced.
        together: rows of a scope, which divide the rows of all heads.
        spread: scores are first moved and scaled to 0 to 1 over the scope.
    """
    batch, heads, rows, columns = scores.shape
    every = batch * heads

    def tiled(x: Bounds) -> Bounds:
        return np.tile(np.ascontiguousarray(x, np.int64), every)

    empty = np.zeros(rows, np.int64)
    starts, ends = (empty, empty) if forced is None else forced
    starts = np.minimum(starts, ends)
    scopes = every * rows // together if together else 0
    shares = np.broadcast_to(np.asarray(share, np.float32), (heads,))
    per_scope = np.repeat(np.tile(shares, batch), rows)[:: max(together, 1)][:scopes]
    flat, indices = _core.choose(
        np.ascontiguousarray(scores, np.float32).ravel(),
        columns,
        tiled(np.minimum(limits, columns)),
        (tiled(starts), tiled(ends)),
        np.zeros(0, bool) if marks is None else np.ascontiguousarray(np.broadcast_to(marks, scores.shape)).ravel(),
        np.ascontiguousarray(per_scope),
        (sinks, least, most, others),
        together,
        counts,
        spread,
    )
    return from_flat(flat, (batch, heads, rows)), indices


def pooled_scores(
    q: NDArray[Any],
    k: NDArray[Any],
    scale: float,
    bounds: tuple[Bounds, Bounds],
    limits: Bounds,
    *,
    weigh: bool = True,
) -> NDArray[np.float32]:
    """Softmax weights (or logits) of the means of blocks of queries over those of blocks of keys."""
    return block_mass(block_means(q, bounds[0]), block_means(k, bounds[1]), scale, limits=limits, weigh=weigh)


def own_blocks(bounds: Bounds, lengths: tuple[int, int], block: int) -> tuple[Bounds, Bounds]:
    """For each block of queries the first, and the end, of the key blocks that its positions are in."""
    at = np.clip(bounds + (lengths[1] - lengths[0]), 0, lengths[1])
    return at[:-1] // block, -(-at[1:] // block)
