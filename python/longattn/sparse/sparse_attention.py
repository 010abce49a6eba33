"""Attention over what a selector chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from longattn._arrays import Array
from longattn._checks import flag, scale_factor, shape_of
from longattn.sparse.block_mask import BlockMask
from longattn.sparse.block_sparse_attention import block_sparse_attention
from longattn.sparse.index_sparse_attention import index_sparse_attention
from longattn.sparse.row_lists import RowLists


class Selector(Protocol):
    """What chooses keys: a function, or an object with parameters, of queries and keys.

    An object's parameters are for prompts of any length: what is shorter than one of its blocks is a single block.
    """

    def __call__(self, q: Array, k: Array, *, causal: bool, scale: float | None) -> BlockMask | RowLists:
        """The keys that each block of queries attends to."""


@dataclass(frozen=True, slots=True)
class SparseStats:
    """What a sparse call did.

    Attributes:
        scored: pairs (of queries and keys, or of what stands for several) that choosing scored.
        attended: pairs of queries and keys that attention was computed over, of the heads that have lists of their own.
        density: their share of the pairs that dense attention computes.
        nbytes: bytes of the lists.
    """

    scored: int
    attended: int
    density: float
    nbytes: int

    @classmethod
    def of(cls, chosen: BlockMask | RowLists, *, causal: bool) -> SparseStats:
        """Statistics of attention over `chosen`."""
        attended, density = chosen.pairs(causal=causal), chosen.density(causal=causal)
        return cls(scored=chosen.scored, attended=attended, density=density, nbytes=chosen.nbytes)


def attend(q: Array, k: Array, v: Array, chosen: BlockMask | RowLists, **options: Any) -> Any:
    """Attention over what was chosen, blocks or rows."""
    if isinstance(chosen, BlockMask):
        return block_sparse_attention(q, k, v, chosen, **options)
    if isinstance(chosen, RowLists):
        return index_sparse_attention(q, k, v, chosen, **options)
    raise TypeError(f"selector: got {type(chosen).__name__} from it, expected a BlockMask or RowLists")


def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    selector: Selector | BlockMask | RowLists,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_stats: bool = False,
    **options: Any,
) -> Any:
    """Softmax attention over the keys that a selector chooses.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        selector: one of `longattn.sparse` (`Moba`, say), any function of that form, or a mask or lists.
        causal: a query sees only keys at its own position and before.
        scale: factor on the dot products; `None` is `D ** -0.5`. The selector gets it, too.
        return_stats: also return `SparseStats`.
        options: those of `block_sparse_attention` and `index_sparse_attention`.

    Returns:
        The output as of `longattn.attention`; with `return_lse` and `return_stats` a tuple with the lse and the
        statistics after it, in this order.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        That of the selector and of attention over what it chose.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 512, 16), dtype=np.float32)
        >>> selector = la.sparse.PowerOfTwo(block=32, n_window=2)
        >>> out, stats = la.sparse_attention(q, k, v, selector, causal=True, return_stats=True)
        >>> 0.4 < stats.density < 0.6
        True
    """
    causal, return_stats = flag(causal, "causal"), flag(return_stats, "return_stats")
    shape = shape_of(q, "q")
    if not shape or not shape[-1]:
        raise ValueError(f"q: got shape {shape}, expected [B, Hq, Lq, D] or [Hq, Lq, D] with D at least 1")
    scale = scale_factor(scale, shape[-1])
    chosen: Any = selector
    if not isinstance(selector, BlockMask | RowLists):
        if not callable(selector):
            raise TypeError(f"selector: got {type(selector).__name__}, expected a selector, a BlockMask or RowLists")
        chosen = selector(q, k, causal=causal, scale=scale)
    result = attend(q, k, v, chosen, causal=causal, scale=scale, **options)
    if not return_stats:
        return result
    stats = SparseStats.of(chosen, causal=causal)
    return (*result, stats) if isinstance(result, tuple) else (result, stats)
