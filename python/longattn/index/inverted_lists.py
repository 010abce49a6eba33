"""`InvertedLists`: keys by their nearest centroid (IVF)."""

from __future__ import annotations

from typing import ClassVar

from longattn import _core
from longattn._checks import integer
from longattn.index._index import Index, check_seed, check_store
from longattn.kv import KVStore


class InvertedLists(Index):
    """Keys in lists by their nearest centroid; the lists that suit a query group are scanned exactly (IVF).

    Centroids are fitted by k-means (Euclidean) to an evenly spaced sample of at most 64 keys per list, once the store
    has 4,096 rows and again whenever it has grown fourfold; a new key goes to the nearest centroid. At a step all
    centroids are scored. Lists are taken in the order of the mean, over the query group, of the share that their
    centroid would have of the softmax among all centroids, until there are `nprobe` of them (or `probe_rows` rows, or
    `top_k` if that is more). The best of their rows are picked by exact logits.

    Smaller stores, and the fewer than 256 newest rows that wait for a list, are scanned. The rows left unread are not
    weighed: only `top_k` with `rest="none"` works.

    Args:
        store: the store to index; it is kept alive.
        lists: lists per KV head, 1 to 4096; `None` is one for 128 rows at the fit, at most 4096.
        nprobe: lists that are scanned at a step.
        probe_rows: instead of `nprobe`: scan lists until they held so many rows.
        seed: seed of the centroids: the same rows and seed give the same lists.

    Raises:
        TypeError: an argument of another kind, or a store of codes.
        ValueError: an argument out of range.

    Cost:
        Memory: 4 bytes per key and KV head, and the centroids. Build: `lists * D` multiply-adds per key, and 6
        rounds of k-means on the sample. A step scores `lists` centroids and the keys of the lists.

    References:
        J. Sivic, A. Zisserman, "Video Google: A Text Retrieval Approach to Object Matching in Videos", 2003; H. Jégou
        et al., "Product Quantization for Nearest Neighbor Search", 2011, for inverted lists of vectors.
    """

    __slots__ = ()

    KIND: ClassVar[str] = "inverted_lists"

    def __init__(
        self,
        store: KVStore,
        *,
        lists: int | None = None,
        nprobe: int = 64,
        probe_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        check_store(store)
        if lists is not None:
            lists = integer(lists, "lists")
            if not 1 <= lists <= 4096:
                raise ValueError(f"lists: got {lists}, expected 1 to 4096")
        nprobe = integer(nprobe, "nprobe")
        if nprobe < 1:
            raise ValueError(f"nprobe: got {nprobe}, expected at least 1")
        if probe_rows is not None:
            probe_rows = integer(probe_rows, "probe_rows")
            if probe_rows < 1:
                raise ValueError(f"probe_rows: got {probe_rows}, expected at least 1")
        handle = _core.inverted_lists(store._handle, lists, nprobe, probe_rows, check_seed(seed))
        self._set(handle, store)
