"""Masks over blocks of queries and blocks of keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import integer
from longattn.sparse._aligning import aligned
from longattn.sparse._lists import Lists, pointers, visible_pairs


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class BlockMask(Lists):
    """Which blocks of keys each block of queries attends to.

    Blocks of queries are `block_q` rows, the first of them `first_q`, the last what is left; blocks of keys are
    `block_k` keys, the last what is left; neither is larger than its length (selectors, which are for prompts of any
    length, make theirs smaller for shorter ones). The mask says which blocks are looked at; what causality or a window
    hides inside them is hidden besides. `a | b` and `a & b` are the union and the intersection of masks of the same
    lengths: over blocks of the common divisor of their sizes where these differ, and with `RowLists` as lists of keys.

    Args:
        indptr: integers `[B, H, query blocks + 1]`: the list of block `i` of head `h` is
            `indices[indptr[b, h, i] : indptr[b, h, i + 1]]`. `B` may be 1 for any batch; `H` is the number of query
            heads, of KV heads, 1, or a number between that divides the query heads: neighbours share.
        indices: integers, numbers of key blocks, each list ascending and without repetition.
        lengths: the numbers of queries and of keys, `(Lq, Lk)`.
        block_q: queries of a block.
        first_q: queries of the first block, 1 to `block_q`; `None` is `block_q`. Where queries start in the middle of
            a block of positions, this keeps blocks of queries at positions that are multiples of `block_q`.
        block_k: keys of a block.
        scored: pairs (of queries and keys, or of what stands for several of them) that choosing the blocks scored.

    Raises:
        TypeError: an argument of another kind.
        ValueError: unsorted, repeated or out-of-range numbers, bounds that do not fit them, another shape, a block
            that is larger than its length (where that is not 0).
    """

    block_k: int

    def __post_init__(self) -> None:
        """Checks everything that the kernels rest on."""
        object.__setattr__(self, "block_k", integer(self.block_k, "block_k", 1))
        super(BlockMask, self).__post_init__()

    def _check_lists(self, limit: int) -> None:
        for name, size, length in (
            ("block_q", self.block_q, self.lengths[0]),
            ("block_k", self.block_k, self.lengths[1]),
        ):
            if 0 < length < size:
                raise ValueError(f"{name}: got {size}, expected at most the length, {length}")
        super(BlockMask, self)._check_lists(limit)

    def _keys_of_each(self) -> int:
        return self.block_k

    def _limit(self) -> int:
        return -(-self.lengths[1] // self.block_k)

    @classmethod
    def from_blocks(
        cls,
        blocks: Array,
        *,
        lengths: tuple[int, int],
        block_q: int,
        block_k: int,
        first_q: int | None = None,
        scored: int = 0,
    ) -> Self:
        """A mask from booleans.

        Args:
            blocks: booleans `[B, H, query blocks, key blocks]`, `[H, query blocks, key blocks]` or without heads.
            lengths: as in the class.
            block_q: as in the class.
            block_k: as in the class.
            first_q: as in the class.
            scored: as in the class.

        Returns:
            The mask.

        Raises:
            TypeError: no booleans.
            ValueError: another shape.
        """
        x = as_numpy(blocks, "blocks", any_strides=True)
        if x.dtype != np.bool_:
            raise TypeError(f"blocks: got dtype {x.dtype}, expected bool")
        if not 2 <= x.ndim <= 4:
            raise ValueError(f"blocks: got shape {x.shape}, expected [B, H, query blocks, key blocks]")
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        expected = -(-integer(lengths[1], "lengths[1]", 0) // integer(block_k, "block_k", 1))
        if x.shape[3] != expected:
            raise ValueError(f"blocks: got {x.shape[3]} key blocks, expected {expected}")
        *outer, indices = np.nonzero(x)
        shape = (x.shape[0], x.shape[1], x.shape[2])
        numbers = (outer[0] * shape[1] + outer[1]) * shape[2] + outer[2]
        return cls(
            indptr=pointers(numbers, shape),
            indices=indices.astype(np.uint32),
            lengths=lengths,
            block_q=block_q,
            block_k=block_k,
            first_q=first_q,
            scored=scored,
        )

    @classmethod
    def per_head(cls, tables: Sequence[BlockMask], which: Sequence[int]) -> BlockMask:
        """One mask whose head `h` is head `h` of `tables[which[h]]`, or its only one.

        Args:
            tables: masks over the same blocks, with a head for each of `which`, or one.
            which: a number for each head.

        Raises:
            TypeError: no masks.
            ValueError: masks over different blocks, or with another number of heads.
        """
        indptr, indices = cls._table(tables, which)
        first = tables[0]
        return cls(
            indptr=indptr,
            indices=indices,
            lengths=first.lengths,
            block_q=first.block_q,
            first_q=first.first_q,
            block_k=first.block_k,
            scored=sum(x.scored for x in tables),
        )

    @staticmethod
    def _common() -> tuple[str, ...]:
        return "lengths", "block_q", "first_q", "block_k"

    @property
    def key_bounds(self) -> NDArray[np.int64]:
        """Where blocks of keys begin, and the number of keys."""
        keys = self.lengths[1]
        return np.append(np.arange(0, keys, self.block_k, dtype=np.int64), keys) if keys else np.zeros(1, np.int64)

    def blocks(self) -> NDArray[np.bool_]:
        """The mask as booleans `[B, H, query blocks, key blocks]`."""
        dense = np.zeros((int(np.prod(self.shape)), self._limit()), bool)
        dense[self._list_numbers(), self.indices] = True
        return dense.reshape(*self.shape, self._limit())

    def to_dense_mask(self) -> NDArray[np.bool_]:
        """The mask as booleans `[B, H, Lq, Lk]`, for small sizes.

        Raises:
            ValueError: more than 2^28 entries.
        """
        self._check_dense()
        rows = np.repeat(self.blocks(), np.diff(self.query_bounds), axis=2)
        return np.repeat(rows, np.diff(self.key_bounds), axis=3)

    def pairs(self, *, causal: bool = False) -> int:
        """Pairs of a query and a key inside the mask, of all its heads; with `causal`, those that causality leaves."""
        numbers, indices = self._list_numbers(), self.indices.astype(np.int64)
        block = numbers % max(self.query_blocks, 1)
        first, last = self.query_bounds[:-1][block], self.query_bounds[1:][block]
        start, keys = self.key_bounds[:-1][indices], np.diff(self.key_bounds)[indices]
        if not causal:
            return int(((last - first) * keys).sum())
        offset = self.lengths[1] - self.lengths[0]
        return visible_pairs(first + offset, last + offset, start, keys)

    def plot(self, *, batch: int = 0, head: int = 0, ax: Any = None) -> Any:
        """Draws the blocks of one head; needs matplotlib.

        Args:
            batch: which batch.
            head: which head.
            ax: matplotlib axes to draw on; `None` makes some.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots()
        rows, keys = self.lengths
        edges = self.key_bounds, self.query_bounds
        ax.pcolormesh(*edges, self.blocks()[batch, head], cmap="Greys", vmin=0, vmax=1)
        ax.set(xlabel="key", ylabel="query", xlim=(0, keys), ylim=(rows, 0))
        return ax

    def __or__(self, other: Lists) -> Any:
        """Blocks of either, a `BlockMask`; with `RowLists`, `RowLists`."""
        return self._with(other, np.union1d)

    def __and__(self, other: Lists) -> Any:
        """Blocks of both, a `BlockMask`; with `RowLists`, `RowLists`."""
        return self._with(other, np.intersect1d)

    def _with(self, other: object, operation: Callable[..., NDArray[Any]]) -> Any:
        if not isinstance(other, Lists):
            raise TypeError(f"other: got {type(other).__name__}, expected a BlockMask or RowLists")
        one, two = aligned([self, other], "other")
        if not isinstance(one, BlockMask):
            return one._with(two, operation)
        return BlockMask(**one._combined(two, operation), block_k=one.block_k)


def fitted(lengths: tuple[int, int], block_q: int, block_k: int, first_q: int | None = None) -> dict[str, Any]:
    """Fields of a mask of blocks of these sizes, or of the lengths where those are less: the same blocks."""
    rows, keys = (max(n, 1) for n in lengths)
    size = min(block_q, rows)
    return {
        "lengths": lengths,
        "block_q": size,
        "first_q": None if first_q is None else min(first_q, size),
        "block_k": min(block_k, keys),
    }
