"""MoBA: the best blocks of keys of each query, by the product with their means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longattn import _core
from longattn._arrays import Array
from longattn._checks import flag
from longattn.methods import Method
from longattn.pictures import causally, example
from longattn.reference import sparse as reference
from longattn.sparse._lists import from_flat
from longattn.sparse._selecting import block_bounds, block_means, keep_integers, selector_inputs
from longattn.sparse.block_mask import BlockMask, fitted
from longattn.sparse.composed import Composable


@dataclass(frozen=True, slots=True, kw_only=True)
class Moba(Composable):
    """The gate of MoBA, as a selector; see `moba_select` for the method.

    Args:
        block: keys of a block.
        top_k: blocks of a query, its own included.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size below 1.
    """

    block: int = 512
    top_k: int = 3

    def __post_init__(self) -> None:
        """Checks the sizes."""
        keep_integers(self, block=1, top_k=1)

    def __call__(self, q: Array, k: Array, *, causal: bool = True, scale: float | None = None) -> BlockMask:
        """The mask, a list for each query of each query head; the scale does not change which blocks are best."""
        del scale
        qn, kn = selector_inputs(q, k)
        causal = flag(causal, "causal")
        batch, heads, rows, _ = qn.shape
        keys = kn.shape[2]
        bounds = block_bounds(keys, self.block)
        blocks = len(bounds) - 1
        positions = np.arange(rows) + (keys - rows)
        own = np.where(positions >= 0, positions // self.block, -1)
        limits = own + 1 if causal else np.full(rows, blocks)
        forced = np.maximum(own, 0), own + 1
        flat, indices = _core.best_forced(qn, block_means(kn, bounds), limits, forced, self.top_k)
        return BlockMask(
            indptr=from_flat(flat, (batch, heads, rows)),
            indices=indices,
            **fitted((rows, keys), 1, self.block),
            scored=batch * heads * rows * blocks,
        )


def moba_select(q: Array, k: Array, *, block: int = 512, top_k: int = 3, causal: bool = True) -> BlockMask:
    """The key blocks that each query attends to by MoBA: its own, and those whose mean key it likes best.

    A query takes the block that its own position is in, and of the blocks before it (of all others, where attention
    is not causal) the best by `q . mean k`, until there are `top_k`. Attention over the mask is causal inside the own
    block.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, those of the last `Lq` keys.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        block: keys of a block.
        top_k: blocks of a query, its own included.
        causal: whether a query takes only blocks before its own.

    Returns:
        The mask, with query blocks of one query, for `longattn.block_sparse_attention`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        One pass over the keys and `Lq * (Lk / block) * D` multiply-adds per query head. Attention: `Lq * top_k * block
        * (D + Dv)`.

    References:
        E. Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", 2025, arXiv:2502.13189.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 600, 16), dtype=np.float32)
        >>> mask = la.sparse.moba_select(q, k, block=100, top_k=2)
        >>> out = la.block_sparse_attention(q, k, v, mask, causal=True)
        >>> mask.density(causal=True) < 0.6
        True
    """
    return Moba(block=block, top_k=top_k)(q, k, causal=causal)


METHOD = Method(
    name="moba_select",
    family="sparse",
    title="MoBA: Mixture of Block Attention for Long-Context LLMs",
    year=2025,
    arxiv="2502.13189",
    function=moba_select,
    reference=reference.moba_select,
    exact=False,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=True,
    checks=(
        "With as many blocks as there are it is dense attention.",
        "With one block per query it is attention inside blocks.",
        "With blocks of one key it is attention to the best keys of each query and its own.",
        "Steps choose what the prefill chooses, where blocks are full.",
        "A query takes its own block whatever it scores.",
    ),
    tests="tests/sparse/test_moba_select.py",
    cost="`Lq * (Lk / block) * D` multiply-adds per query head to choose, `Lq * top_k * block * (D + Dv)` besides.",
    mask=lambda: causally(moba_select(*example(), block=8, top_k=3).to_dense_mask()),
)
