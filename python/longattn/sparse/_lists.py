"""What `BlockMask` and `RowLists` have in common: ascending lists of numbers per head and block of queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from longattn._checks import integer

#: The most entries of a mask that `to_dense_mask` makes.
_DENSE_LIMIT = 2**28


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Lists:
    """Lists per batch, head and block of queries; see the classes that are made of it."""

    indptr: NDArray[np.int64]
    indices: NDArray[np.uint32]
    lengths: tuple[int, int]
    block_q: int
    first_q: int | None = None
    scored: int = 0

    def __post_init__(self) -> None:
        """Checks everything that the kernels rest on."""
        lengths = self.lengths
        if not isinstance(lengths, tuple | list) or len(lengths) != 2:
            raise TypeError(f"lengths: got {lengths!r}, expected a pair (Lq, Lk)")
        object.__setattr__(
            self, "lengths", (integer(lengths[0], "lengths[0]", 0), integer(lengths[1], "lengths[1]", 0))
        )
        object.__setattr__(self, "block_q", integer(self.block_q, "block_q", 1))
        first = self.block_q if self.first_q is None else integer(self.first_q, "first_q", 1, self.block_q)
        object.__setattr__(self, "first_q", first)
        object.__setattr__(self, "scored", integer(self.scored, "scored", 0))
        self._check_lists(self._limit())

    def _limit(self) -> int:
        """Numbers of the lists lie below this."""
        raise NotImplementedError

    def _keys_of_each(self) -> int:
        """Keys that each of the numbers stands for."""
        raise NotImplementedError

    def _check_lists(self, limit: int) -> None:
        indptr, indices = (np.require(x, requirements=["C", "A"]) for x in (self.indptr, self.indices))
        for x, name in ((indptr, "indptr"), (indices, "indices")):
            if x.dtype.kind not in "iu":
                raise TypeError(f"{name}: got dtype {x.dtype}, expected integers")
        if indptr.ndim != 3 or indptr.shape[2] != self.query_blocks + 1 or 0 in indptr.shape:
            raise ValueError(
                f"indptr: got shape {indptr.shape}, expected [B, H, {self.query_blocks + 1}] for {self.lengths[0]} "
                f"queries in blocks of {self.block_q}"
            )
        if indices.ndim != 1:
            raise ValueError(f"indices: got shape {indices.shape}, expected rank 1")
        indptr = indptr.astype(np.int64, copy=False)
        starts, ends = indptr[..., :-1].ravel(), indptr[..., 1:].ravel()
        flat = np.append(starts, indices.size)
        if (flat[0] if flat.size > 1 else 0) != 0 or (flat[:-1] > flat[1:]).any() or (flat[1:] != ends).any():
            raise ValueError(f"indptr: got bounds that leave gaps, fall or do not end at the {indices.size} indices")
        if indices.size:
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= limit:
                raise ValueError(f"indices: got numbers from {low} to {high}, expected 0 to {limit - 1}")
            falls = np.empty(indices.size, bool)
            falls[0] = False
            np.less_equal(indices[1:], indices[:-1], out=falls[1:])
            falls[flat[flat < indices.size]] = False
            if falls.any():
                at = int(np.argmax(falls))
                raise ValueError(
                    f"indices: got {indices[at - 1]}, then {indices[at]} in one list, expected each list ascending "
                    "without repetition"
                )
        object.__setattr__(self, "indptr", indptr)
        object.__setattr__(self, "indices", indices.astype(np.uint32, copy=False))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch, heads and blocks of queries, `(B, H, blocks)`."""
        batch, heads, bounds = self.indptr.shape
        return batch, heads, bounds - 1

    @property
    def query_blocks(self) -> int:
        """Number of blocks of queries."""
        return len(self.query_bounds) - 1

    @property
    def query_bounds(self) -> NDArray[np.int64]:
        """Where blocks of queries begin, and the number of queries."""
        first = self.block_q if self.first_q is None else self.first_q
        rows = self.lengths[0]
        inner = np.arange(first, rows, self.block_q, dtype=np.int64)
        return np.concatenate([[0], inner, [rows]]) if rows else np.zeros(1, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the lists."""
        return int(self.indptr.nbytes + self.indices.nbytes)

    def _flat(self) -> NDArray[np.int64]:
        """`indptr` without what it says twice."""
        return np.append(self.indptr[..., :-1].ravel(), self.indices.size)

    def _for_kernel(self) -> tuple[NDArray[np.int64], NDArray[np.uint32], tuple[int, int], NDArray[np.int64]]:
        """The lists as the core takes them."""
        return self._flat(), self.indices, self.shape[:2], self.query_bounds

    def _list_numbers(self) -> NDArray[np.int64]:
        """The list that each of `indices` is in."""
        return np.repeat(np.arange(np.prod(self.shape)), np.diff(self._flat()))

    def _combined(self, other: Self, operation: Callable[..., NDArray[Any]]) -> dict[str, Any]:
        """Fields of the lists that a set operation makes of both, which are over the same blocks."""
        limit = max(self._limit(), 1)
        codes = operation(*(x._list_numbers() * limit + x.indices for x in (self, other)))
        return {
            "indptr": pointers(codes // limit, self.shape),
            "indices": (codes % limit).astype(np.uint32),
            "lengths": self.lengths,
            "block_q": self.block_q,
            "first_q": self.first_q,
            "scored": self.scored + other.scored,
        }

    @classmethod
    def _table(cls, tables: Sequence[Lists], which: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """`indptr` and `indices` with head `h` of table `which[h]` for each head `h`, or its only one."""
        if not isinstance(tables, Sequence) or not tables or not all(isinstance(x, cls) for x in tables):
            raise TypeError(f"tables: got {tables!r}, expected at least one {cls.__name__}")
        which = [integer(x, "which", 0, len(tables) - 1) for x in which]
        if not which:
            raise ValueError("which: got none, expected a number for each head")
        batch = max(x.shape[0] for x in tables)
        for x in tables:
            if x.shape[0] not in (1, batch) or x.shape[1] not in (1, len(which)):
                raise ValueError(f"tables: got shape {x.shape}, expected batch 1 or {batch}, heads 1 or {len(which)}")
            for name in cls._common():
                if getattr(x, name) != getattr(tables[0], name):
                    raise ValueError(f"tables: got {name} {getattr(x, name)}, expected {getattr(tables[0], name)}")
        counts, parts = [], []
        for b in range(batch):
            for h, table in enumerate(which):
                x = tables[table]
                bounds = x.indptr[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]
                counts.append(np.diff(bounds))
                parts.append(x.indices[bounds[0] : bounds[-1]])
        flat = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
        return from_flat(flat, (batch, len(which), tables[0].shape[2])), np.concatenate(parts)

    @staticmethod
    def _common() -> tuple[str, ...]:
        """What tables that are put together have in common."""
        return "lengths", "block_q", "first_q"

    def pairs(self, *, causal: bool = False) -> int:
        """Pairs of a query and a key of its list, of all heads; with `causal`, those that causality leaves."""
        raise NotImplementedError

    def density(self, *, causal: bool = False) -> float:
        """Share of the pairs of queries and keys that are listed; with `causal`, of those that causality leaves."""
        batch, heads, _ = self.shape
        rows, keys = self.lengths
        every = rows * keys
        if causal:
            first = np.array([keys - rows])
            every = visible_pairs(first, first + rows, np.zeros(1, np.int64), keys)
        return self.pairs(causal=causal) / (batch * heads * every) if every else 0.0

    def _check_dense(self) -> None:
        batch, heads, _ = self.shape
        size = batch * heads * self.lengths[0] * self.lengths[1]
        if size > _DENSE_LIMIT:
            raise ValueError(f"to_dense_mask: got {size} entries, expected at most {_DENSE_LIMIT}")


def pointers(numbers: NDArray[np.int64], shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """`indptr` of lists whose entries belong, in ascending order, to the lists `numbers` of `shape`."""
    batch, heads, blocks = shape
    ends = np.searchsorted(numbers, np.arange(1, batch * heads * blocks + 1)).reshape(shape)
    starts = np.concatenate([[0], ends.ravel()[:-1]]).reshape(shape) if blocks else ends
    first = starts[..., :1] if blocks else np.zeros((batch, heads, 1), np.int64)
    return np.concatenate([first, ends], axis=-1)


def from_flat(flat: NDArray[np.int64], shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """`indptr` `[B, H, blocks + 1]` of the bounds of all lists, one after another."""
    batch, heads, blocks = shape
    at = np.arange(batch * heads)[:, None] * blocks + np.arange(blocks + 1)
    indptr: NDArray[np.int64] = flat[at].reshape(batch, heads, blocks + 1)
    return indptr


def visible_pairs(
    first: NDArray[np.int64], last: NDArray[np.int64], start: NDArray[np.int64], keys: NDArray[np.int64] | int
) -> int:
    """Pairs of a position in `first` to `last - 1` and one of `keys` keys from `start` on, key <= position."""

    def below(n: NDArray[np.int64]) -> NDArray[np.int64]:
        n = np.maximum(n, 0)
        return n * (n + 1) // 2

    whole = below(last - start) - below(first - start)
    beyond = below(last - start - keys) - below(first - start - keys)
    return int((whole - beyond).sum())
