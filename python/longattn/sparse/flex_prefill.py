"""FlexPrefill: for each head, blocks by means where these predict well, else blocks on vertical and slanted lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array
from longattn._checks import real, scale_factor
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._choosing import block_mass, choose, own_blocks, pooled_scores
from longattn.sparse._lists import from_flat
from longattn.sparse._selecting import (
    aligned_first,
    block_bounds,
    block_means,
    head_numbers,
    keep_integers,
    key_limits,
    only_causal,
    per_query_head,
    selector_inputs,
)
from longattn.sparse.block_mask import BlockMask, fitted
from longattn.sparse.composed import Composable
from longattn.sparse.sparse_attention import sparse_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexPrefill(Composable):
    """The mask of FlexPrefill, causal, for each query head by one of two rules.

    The last `block` queries stand for all. Their true weights, summed over blocks of keys, are compared with those that
    the products of means predict, by the root of the Jensen-Shannon divergence (natural logarithm).

    Below `tau` the head is *query-aware*: of all pairs of a block of queries and one of keys it takes the fewest best
    by the softmax over means that have a share `gamma` of its sum over the whole map. Otherwise it takes *lines*: the
    fewest key blocks, and the fewest distances in blocks, that have a share `gamma` of those queries' weights. Either
    way each block of queries takes the first block and its own, and at least `min_budget` keys.

    Args:
        gamma: share of the weights, a number or `[Hq]`; from 1 on all blocks are taken.
        tau: the largest divergence of a query-aware head; 0 makes all heads take lines, and 1 makes none.
        block: queries and keys of a block.
        min_budget: keys that each block of queries takes at least, where there are so many.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size below 1, or a negative `tau`.
    """

    gamma: Any = 0.9
    tau: float = 0.1
    block: int = 128
    min_budget: int = 1024

    def __post_init__(self) -> None:
        """Checks what does not depend on the heads."""
        keep_integers(self, block=1, min_budget=0)
        head_numbers(self.gamma, "gamma")
        if not real(self.tau, "tau") >= 0:
            raise ValueError(f"tau: got {self.tau}, expected at least 0")

    def divergence(self, q: Array, k: Array, *, scale: float | None = None) -> NDArray[np.float64]:
        """How far the means' prediction is from the last queries' weights, 0 to 0.84, `[B, Hq]`."""
        qn, kn = selector_inputs(q, k)
        bounds = block_bounds(kn.shape[2], self.block)
        last = self._last(qn, kn)
        keys, rows = kn.shape[2], last.shape[2]
        batch, heads = qn.shape[:2]
        if not rows:
            return np.zeros((batch, heads))
        factor = scale_factor(scale, qn.shape[3])
        blocks = bounds[:-1], bounds[1:]
        limits = np.arange(keys - rows, keys) + 1
        true = block_mass(last, kn, factor, limits=limits, row_bounds=np.array([0, rows]), blocks=blocks)
        p = true[:, :, 0].astype(np.float64) / rows
        mean_q, mean_k = block_means(last, np.array([0, rows])), block_means(kn, bounds)
        guess = block_mass(mean_q, mean_k, factor, limits=np.array([len(bounds) - 1]))[:, :, 0].astype(np.float64)
        middle = (p + guess) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = [np.where(x > 0, x * np.log(x / middle), 0.0).sum(axis=-1) for x in (p, guess)]
        root: NDArray[np.float64] = np.sqrt(np.maximum(sum(parts) / 2, 0.0))
        return root

    def __call__(self, q: Array, k: Array, *, causal: bool = True, scale: float | None = None) -> BlockMask:
        """The mask, a list for each query head."""
        only_causal(causal)
        qn, kn = selector_inputs(q, k)
        batch, heads, rows, dim = qn.shape
        lengths, factor = (rows, kn.shape[2]), scale_factor(scale, dim)
        share = per_query_head(self.gamma, "gamma", heads)
        aware = self.divergence(qn, kn, scale=factor) < self.tau
        first_q = aligned_first(lengths, self.block)
        bounds, bounds_k = block_bounds(rows, self.block, first_q), block_bounds(lengths[1], self.block)
        limits = -(-key_limits(bounds, lengths, True) // self.block)
        own = own_blocks(bounds, lengths, self.block)
        count, n = len(bounds) - 1, len(bounds_k) - 1
        least = -(-self.min_budget // self.block)
        shape, fields = (batch, heads, count), fitted(lengths, self.block, self.block, first_q)
        weights = pooled_scores(qn, kn, factor, (bounds, bounds_k), limits)
        every = choose(weights, limits, forced=own, sinks=1, share=share, together=max(count, 1), counts=False)
        some = choose(weights, limits, forced=own, sinks=1, least=least, most=least)
        columns, distances = self._lines(qn, kn, factor, share)
        flat = [np.append(indptr[..., :-1].ravel(), indices.size) for indptr, indices in (columns, distances)]
        positions = np.append(own[0], limits[-1:]) if count else np.zeros(1, np.int64)
        on_lines = _core.line_lists((flat[0], columns[1]), (flat[1], distances[1]), positions)
        masks = [
            BlockMask(indptr=indptr, indices=indices, **fields)
            for indptr, indices in (every, (from_flat(on_lines[0], shape), on_lines[1]), some)
        ]
        parts = [
            BlockMask.per_head([_of_batch(x, b) for x in masks[:2]], np.where(aware[b], 0, 1).tolist())
            for b in range(batch)
        ]
        mask = _stacked(parts) | masks[2]
        scored = batch * heads * (self._last(qn, kn).shape[2] * lengths[1] + count * n)
        return BlockMask(indptr=mask.indptr, indices=mask.indices, scored=scored, **fields)

    def _last(self, q: NDArray[Any], k: NDArray[Any]) -> NDArray[Any]:
        return q[:, :, max(0, q.shape[2] - min(self.block, k.shape[2])) :]

    def _lines(
        self, q: NDArray[Any], k: NDArray[Any], scale: float, share: NDArray[np.float32]
    ) -> tuple[tuple[NDArray[np.int64], NDArray[np.uint32]], ...]:
        """Key blocks, and distances in blocks, for each head."""
        last, (batch, heads), keys = self._last(q, k), q.shape[:2], k.shape[2]
        starts = np.arange(0, keys, self.block)
        group = heads // k.shape[1]
        blocks = np.zeros((2, batch, heads, 1, len(starts)), np.float32)
        for kv_head in range(k.shape[1] if last.shape[2] else 0):
            some = slice(kv_head * group, (kv_head + 1) * group)
            for to, part in zip(
                blocks, _core.line_mass(last[:, some], k[:, kv_head : kv_head + 1], scale), strict=True
            ):
                to[:, some, 0] = np.add.reduceat(part.reshape(batch, group, keys), starts, axis=-1)
        limits, first = np.array([len(starts)]), np.array([0])
        budget = -(-self.min_budget // self.block)
        return tuple(
            choose(x, limits, forced=(first, first + 1), share=share, least=min(budget, len(starts)), counts=False)
            for x in blocks
        )


def _of_batch(mask: BlockMask, batch: int) -> BlockMask:
    """One batch of a mask."""
    indptr = mask.indptr[batch : batch + 1]
    first, last = int(indptr.min()), int(indptr.max())
    return BlockMask(
        indptr=indptr - first,
        indices=mask.indices[first:last],
        lengths=mask.lengths,
        block_q=mask.block_q,
        first_q=mask.first_q,
        block_k=mask.block_k,
    )


def _stacked(masks: list[BlockMask]) -> BlockMask:
    """Masks of one batch each, as one."""
    first, starts = masks[0], np.cumsum([0, *(x.indices.size for x in masks)])
    return BlockMask(
        indptr=np.concatenate([x.indptr + at for x, at in zip(masks, starts, strict=False)]),
        indices=np.concatenate([x.indices for x in masks]),
        lengths=first.lengths,
        block_q=first.block_q,
        first_q=first.first_q,
        block_k=first.block_k,
    )


def flex_prefill(
    q: Array,
    k: Array,
    v: Array,
    *,
    gamma: float | Array = 0.9,
    tau: float = 0.1,
    block: int = 128,
    min_budget: int = 1024,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Causal attention over blocks that each head chooses by the rule that suits it, as many as it needs.

    The last `block` queries stand for all. Where the products of means predict their weights over blocks of keys well
    (root of the Jensen-Shannon divergence below `tau`), the head takes the fewest pairs of blocks that have a share
    `gamma` of the predicted map, so that blocks of queries with spread-out weights get more. Otherwise it takes the
    fewest key blocks, and the fewest distances in blocks, that have that share of the last queries' weights. Every
    block of queries takes the first block, its own, and at least `min_budget` keys.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, those of the last `Lq` keys.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        gamma: share of the weights, a number or `[Hq]`; from 1 on it is causal attention.
        tau: the largest divergence of a query-aware head; 0 makes all heads take lines, and 1 makes none.
        block: queries and keys of a block.
        min_budget: keys that each block of queries takes at least, where there are so many; by its means for all
            heads, and as many lines of either kind.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        options: those of `sparse_attention`: `return_lse`, `return_stats`, `out`, `softcap`, `sinks`, ...

    Returns:
        The output as of `longattn.sparse_attention`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Choosing: `2 block * Lk * D + (Lq / block) (Lk / block) D` multiply-adds per query head and one pass over
        queries and keys; attention: `(D + Dv)` per query and key of the chosen blocks.

    References:
        X. Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
        2025, arXiv:2502.20766.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 1024, 16), dtype=np.float32)
        >>> out, stats = la.sparse.flex_prefill(q, k, v, gamma=0.5, block=64, min_budget=128, return_stats=True)
        >>> stats.density < 0.95
        True
    """
    selector = FlexPrefill(gamma=gamma, tau=tau, block=block, min_budget=min_budget)
    return sparse_attention(q, k, v, selector, causal=True, scale=scale, **options)


METHOD = Method(
    name="flex_prefill",
    family="sparse",
    title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
    year=2025,
    arxiv="2502.20766",
    function=flex_prefill,
    reference=reference.flex_prefill,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "With a share of 1 it is causal attention.",
        "With `tau` 0 every head takes lines, with 1 none does.",
        "Where the rows of each block are equal the divergence is 0 but for the last block.",
        "Every block of queries takes the first block, its own and the budget.",
        "It is dense attention with the mask that its blocks stand for.",
    ),
    tests="tests/sparse/test_flex_prefill.py",
    cost="`2 block * Lk * D + (Lq / block) (Lk / block) D` multiply-adds per query head to choose.",
    mask=lambda: seen(flex_prefill, *example(), gamma=0.7, block=8, min_budget=16),
)
