"""`LshTables`: hash tables that sample rows for a query."""

from __future__ import annotations

from typing import ClassVar

from longattn import _core
from longattn._checks import integer
from longattn.index._index import Index, check_seed, check_store
from longattn.kv import KVStore


class LshTables(Index):
    """Hash tables of every key of a store, from which rows are drawn with a chance that is known.

    Each of `tables` tables has `bits` random directions. A key, less the head's mean key, is in the bucket that the
    signs of its products with them name, and so is a query. A key at angle `a` from a query shares the bucket of one
    table with chance `p ** bits`, `p = 1 - a / pi`, and at least two with

        u = 1 - (1 - p**bits)**tables - tables * p**bits * (1 - p**bits)**(tables - 1).

    A query head uses the rows that do, each with `-ln u` added to its logit, so that the numerator and the denominator
    of the softmax are unbiased over the directions. The heads of a group sample on their own; a row that any of them
    uses is read once. How many are read follows from `tables` and `bits`. `top_k` is a limit: where more rows are met,
    those that are met in the most tables stay, as they are weighted, and the sums come out too small.

    The index grows with its store by itself, 64 rows at a time (rows that are in no table yet are read exactly), and
    follows `truncate`. The mean key is fitted at the first use, once the store has 512 rows, and again, with all
    tables made anew, when it has grown fourfold; as the softmax does not change when all keys are moved, the estimate
    is unbiased with any. Several threads may use one index.

    Args:
        store: the store to index; it is kept alive.
        tables: hash tables, 2 to 255.
        bits: bits of a bucket's number, 0 to 16. With 0 every row is met by every query.
        seed: seed of the directions, which all heads share.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument out of range, or a store of codes.

    Cost:
        Memory: `2 * tables + 4` bytes per key and KV head, and `4 * tables * 2 ** bits` bytes for every span of rows (a
        few, of up to 65,536). Build: `head_dim * tables * bits` multiply-adds per key and KV head, the most of all
        indexes. A query costs `head_dim * tables * bits` multiply-adds, and what its buckets hold.

    References:
        Z. Chen et al., "MagicPIG: LSH Sampling for Efficient LLM Generation", 2024, arXiv:2410.16179.
    """

    __slots__ = ()

    KIND: ClassVar[str] = "lsh"

    def __init__(self, store: KVStore, tables: int = 150, bits: int = 10, *, seed: int = 0) -> None:
        check_store(store)
        tables, bits = integer(tables, "tables", 2, 255), integer(bits, "bits", 0, 16)
        self._set(_core.lsh_tables(store._handle, tables, bits, check_seed(seed)), store)

    @property
    def tables(self) -> int:
        """Hash tables."""
        return int(self.parameters["tables"])

    @property
    def bits(self) -> int:
        """Bits of a bucket's number."""
        return int(self.parameters["bits"])
