"""MInference's dynamic blocks: as many key blocks, the best by means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longattn._arrays import Array
from longattn._checks import flag, scale_factor
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._choosing import choose, own_blocks, pooled_scores
from longattn.sparse._selecting import block_bounds, keep_integers, key_limits, selector_inputs
from longattn.sparse.block_mask import BlockMask, fitted
from longattn.sparse.composed import Composable
from longattn.sparse.sparse_attention import sparse_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicBlocks(Composable):
    """The block-sparse pattern of MInference: each block of queries takes the `top_k` best key blocks by their means.

    Args:
        top_k: key blocks of a block of queries, those of `own` included.
        block: queries and keys of a block.
        own: always take the key blocks that the positions of the queries are in.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size below 1.
    """

    top_k: int = 100
    block: int = 64
    own: bool = True

    def __post_init__(self) -> None:
        """Checks the sizes."""
        keep_integers(self, top_k=1, block=1)
        flag(self.own, "own")

    def __call__(self, q: Array, k: Array, *, causal: bool = False, scale: float | None = None) -> BlockMask:
        """The mask, a list for each query head."""
        qn, kn = selector_inputs(q, k)
        causal = flag(causal, "causal")
        batch, heads, rows, dim = qn.shape
        lengths = (rows, kn.shape[2])
        bounds, bounds_k = block_bounds(rows, self.block), block_bounds(kn.shape[2], self.block)
        limits = -(-key_limits(bounds, lengths, causal) // self.block)
        scores = pooled_scores(qn, kn, scale_factor(scale, dim), (bounds, bounds_k), limits, weigh=False)
        forced = own_blocks(bounds, lengths, self.block) if self.own else None
        indptr, indices = choose(scores, limits, forced=forced, least=self.top_k, most=self.top_k)
        return BlockMask(
            indptr=indptr,
            indices=indices,
            **fitted(lengths, self.block, self.block),
            scored=batch * heads * (len(bounds) - 1) * (len(bounds_k) - 1),
        )


def dynamic_block_topk(
    q: Array,
    k: Array,
    v: Array,
    *,
    top_k: int = 100,
    block: int = 64,
    own: bool = True,
    causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Attention of each block of queries to the key blocks whose mean has the largest product with its own.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        top_k: key blocks of a block of queries, those of `own` included.
        block: queries and keys of a block.
        own: always take the key blocks that the positions of the queries are in.
        causal: a query sees only keys at its own position and before.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        options: those of `sparse_attention`: `return_lse`, `return_stats`, `out`, `softcap`, `sinks`, ...

    Returns:
        The output as of `longattn.sparse_attention`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Choosing: `(Lq / block) (Lk / block) D` multiply-adds per query head and one pass over queries and keys;
        attention: `Lq * top_k * block * (D + Dv)`.

    References:
        H. Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        2024, arXiv:2407.02490 (its block-sparse pattern).

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 512, 16), dtype=np.float32)
        >>> out, stats = la.sparse.dynamic_block_topk(q, k, v, top_k=2, block=64, return_stats=True)
        >>> stats.density
        0.25
    """
    selector = DynamicBlocks(top_k=top_k, block=block, own=own)
    return sparse_attention(q, k, v, selector, causal=causal, scale=scale, **options)


METHOD = Method(
    name="dynamic_block_topk",
    family="sparse",
    title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
    year=2024,
    arxiv="2407.02490",
    function=dynamic_block_topk,
    reference=reference.dynamic_block_topk,
    exact=False,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "With as many blocks as there are it is dense attention.",
        "With blocks of one row it is attention to the best keys of each query.",
        "Where the rows of each block are equal it takes the blocks with the largest weights.",
        "It is dense attention with the mask that its blocks stand for.",
    ),
    tests="tests/sparse/test_dynamic_block_topk.py",
    cost="`(Lq / block) (Lk / block) D` multiply-adds per query head to choose, `Lq * top_k * block * (D + Dv)` then.",
    mask=lambda: seen(dynamic_block_topk, *example(), top_k=4, block=8, causal=True),
)
