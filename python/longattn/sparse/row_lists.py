"""Lists of keys per block of queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import as_numpy
from longattn._checks import check_floating, integer
from longattn.sparse._aligning import aligned
from longattn.sparse._lists import Lists, visible_pairs


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RowLists(Lists):
    """Which keys each block of queries attends to, one by one.

    Causality or a window hide listed keys besides. `a | b` and `a & b` are the union and the intersection of lists
    without `bias` of the same lengths, or of lists and a `BlockMask`: with lists for each block of queries as small as
    the common divisor of the sizes where these differ.

    Args:
        indptr: integers `[B, H, query blocks + 1]`: the list of block `i` of head `h` is
            `indices[indptr[b, h, i] : indptr[b, h, i + 1]]`, and may be empty. `B` may be 1 for any batch; `H` is the
            number of query heads, of KV heads, 1, or a number between that divides the query heads: neighbours share.
        indices: integers, numbers of keys, each list ascending and without repetition.
        lengths: the numbers of queries and of keys, `(Lq, Lk)`.
        block_q: queries that share a list.
        first_q: queries of the first block, 1 to `block_q`; `None` is `block_q`.
        bias: floating, one number for each of `indices`, added to the logits of all queries and heads that share the
            list: logs of weights, -inf for a key that does not count.
        scored: pairs (of queries and keys, or of what stands for several of them) that choosing the keys scored.

    Raises:
        TypeError: an argument of another kind.
        ValueError: unsorted, repeated or out-of-range numbers, bounds that do not fit them, another shape.
    """

    bias: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        """Checks everything that the kernels rest on."""
        super(RowLists, self).__post_init__()
        if self.bias is not None:
            bias = as_numpy(self.bias, "bias")
            check_floating(bias, "bias")
            if bias.shape != self.indices.shape:
                raise ValueError(f"bias: got shape {bias.shape}, expected {self.indices.shape} as indices")
            object.__setattr__(self, "bias", np.ascontiguousarray(bias, np.float32))

    def _keys_of_each(self) -> int:
        return 1

    def _limit(self) -> int:
        return self.lengths[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the lists."""
        return super(RowLists, self).nbytes + (0 if self.bias is None else self.bias.nbytes)

    def to_dense_mask(self) -> NDArray[np.bool_]:
        """The lists as booleans `[B, H, Lq, Lk]`, for small sizes.

        Raises:
            ValueError: more than 2^28 entries.
        """
        return self._dense(True, bool)

    def to_dense_bias(self) -> NDArray[np.float32]:
        """What is added to each logit, `[B, H, Lq, Lk]`, -inf where a key is not listed; for small sizes.

        Raises:
            ValueError: more than 2^28 entries.
        """
        if self.bias is None:
            return np.where(self.to_dense_mask(), np.float32(0), np.float32(-np.inf))
        listed = self._dense(self.bias, np.float32)
        return np.where(self.to_dense_mask(), listed, np.float32(-np.inf))

    @classmethod
    def per_head(cls, tables: Sequence[RowLists], which: Sequence[int]) -> RowLists:
        """Lists whose head `h` is head `h` of `tables[which[h]]`, or its only one.

        Args:
            tables: lists without `bias` of the same blocks of queries, with a head for each of `which`, or one.
            which: a number for each head.

        Raises:
            TypeError: no lists.
            ValueError: lists of different blocks, with a bias, or with another number of heads.
        """
        indptr, indices = cls._table(tables, which)
        if any(x.bias is not None for x in tables):
            raise ValueError("tables: got lists with a bias, expected lists without")
        first = tables[0]
        return cls(
            indptr=indptr,
            indices=indices,
            lengths=first.lengths,
            block_q=first.block_q,
            first_q=first.first_q,
            scored=sum(x.scored for x in tables),
        )

    def plot(self, *, batch: int = 0, head: int = 0, cells: int = 512, ax: Any = None) -> Any:
        """Draws how much of each part of the queries and keys one head's lists hold; needs matplotlib.

        Args:
            batch: which batch.
            head: which head.
            cells: parts of the keys, at most.
            ax: matplotlib axes to draw on; `None` makes some.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots()
        rows, keys = self.lengths
        edges = np.linspace(0, keys, min(integer(cells, "cells", 1), max(keys, 1)) + 1)
        bounds = self.indptr[batch, head]
        shares = np.zeros((self.query_blocks, len(edges) - 1))
        for i, share in enumerate(shares):
            share[:] = np.histogram(self.indices[bounds[i] : bounds[i + 1]], edges)[0] / np.diff(edges).clip(min=1)
        ax.pcolormesh(edges, self.query_bounds, shares, cmap="Greys", vmin=0, vmax=1)
        ax.set(xlabel="key", ylabel="query", xlim=(0, keys), ylim=(rows, 0))
        return ax

    def _dense(self, values: Any, dtype: Any) -> NDArray[Any]:
        self._check_dense()
        dense = np.zeros((int(np.prod(self.shape)), self.lengths[1]), dtype)
        dense[self._list_numbers(), self.indices] = values
        return np.repeat(dense.reshape(*self.shape, self.lengths[1]), np.diff(self.query_bounds), axis=2)

    def pairs(self, *, causal: bool = False) -> int:
        """Pairs of a query and a listed key, of all heads; with `causal`, those that causality leaves."""
        block = self._list_numbers() % max(self.query_blocks, 1)
        first, last = self.query_bounds[:-1][block], self.query_bounds[1:][block]
        if not causal:
            return int((last - first).sum())
        offset = self.lengths[1] - self.lengths[0]
        return visible_pairs(first + offset, last + offset, self.indices.astype(np.int64), 1)

    def __or__(self, other: Lists) -> RowLists:
        """Keys of either."""
        return self._with(other, np.union1d)

    def __and__(self, other: Lists) -> RowLists:
        """Keys of both."""
        return self._with(other, np.intersect1d)

    def _with(self, other: object, operation: Callable[..., NDArray[Any]]) -> RowLists:
        if not isinstance(other, Lists):
            raise TypeError(f"other: got {type(other).__name__}, expected RowLists or a BlockMask")
        one, two = aligned([self, other], "other")
        return RowLists(**one._combined(two, operation))
