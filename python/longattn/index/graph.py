"""`Graph`: a graph over the keys that is built around queries, and searched by a beam."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import FLOATS, Array, as_numpy
from longattn._checks import integer, one_of
from longattn.index._index import Index, check_seed, check_store
from longattn.kv import KVStore

#: argument, lowest, highest
_RANGES = (
    ("neighbours", 1, 100),
    ("max_degree", 9, 128),
    ("query_neighbours", 2, 4096),
    ("beam", 1, 1 << 20),
    ("ef", 1, (1 << 32) - 1),
    ("tail_max", 0, (1 << 32) - 1),
)


class Graph(Index):
    """A proximity graph of each head's keys, built around a sample of the queries that will be asked (RoarGraph).

    Queries of a model lie far from its keys, and a graph of what keys are near each other leads searches for them
    astray. Here the keys nearest to each sampled prefill query, found exactly, are linked with each other:

    1. For each sampled query the `query_neighbours` keys of largest product (causality is ignored). The nearest is the
       query's pivot; all that queries of one pivot found is pruned to `neighbours` links (a key is left out where a
       link that is kept is nearer to it than the pivot is) and linked both ways. Later steps keep these links.
    2. Every key is linked with what a beam search of width `beam` for it finds, pruned likewise, and back.
    3. What cannot be reached from the entry, the key nearest to the mean key, gets a link from near by.

    A step searches the graph once per query of the group, ordered by `q . k`, starting at the entry: of the best row
    not yet looked at, all links are scored, until none of the best `ef` is left. What the searches found is put
    together, and the `top_k` rows of most weight for the group are picked by their exact logits. A search for at least
    as many rows as there are finds all of them. `keys_scored` counts the keys that searches scored.

    Rows that leave the window wait, at most `tail_max` of them, are scanned meanwhile and then linked together: with
    the pivots of the sampled queries among whose nearest they are, and by step 2. Stores of fewer than 4,096 rows
    have no graph and are scanned. When the store has grown to four times what it was, or half of it was truncated,
    the graph is built anew, around the same queries; after smaller truncates links to lost rows go and step 3 is
    repeated. The rows left unread are not weighed: only `top_k` with `rest="none"` works.

    The same rows, queries and seed give the same graph, whatever the number of threads.

    Args:
        store: the store to index; it is kept alive.
        queries: floating `[Hq, n, D]`, a sample of the prefill's queries, at their positions (rotated); `Hq` a
            multiple of the store's heads. A few thousand per KV head do. They are kept, in float32, for builds to
            come. `None` makes a graph of the keys alone.
        neighbours: links that pruning leaves a key, 1 to 100.
        max_degree: the most links of a key, at least `neighbours + 8`, at most 128.
        query_neighbours: keys found for each sampled query, 2 to 4096.
        beam: width of the searches that link keys.
        ef: width of a step's searches; `top_k` where that is more.
        kk_metric: what keys are near each other by: `"ip"` (inner product, best on synthetic heads), `"l2"` or `"cos"`.
        index_per: `"kv_head"`: one graph per KV head, around the queries of its whole group; `"query_head"`: one per
            query head, around its own, with as many times the memory.
        search_by: search for each query of the group (`"head"`), or once for their mean (`"mean"`).
        tail_max: rows that may wait to be linked.
        seed: seed of the order in which keys are linked.

    Raises:
        TypeError: an argument of another kind, or a store of codes.
        ValueError: an argument out of range, queries that do not fit the store, or a graph per query head without
            queries.

    Cost:
        Memory: `4 * max_degree + 1` bytes per key and graph (4 more per KV head for `"l2"` and `"cos"`), by default
        257 beside 512 of a key and value of 128 dimensions in 16 bits; and the queries. Build: `n` products with
        every key, and about `30 * beam` per key. A step scores some hundreds to thousands of keys for each query,
        one after another in memory's worst order.

    References:
        D. Liu et al., "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval", 2024
        (arXiv 2409.10516); M. Chen et al., "RoarGraph: A Projected Bipartite Graph for Efficient Cross-Modal
        Approximate Nearest Neighbor Search", 2024.
    """

    __slots__ = ()

    KIND: ClassVar[str] = "graph"

    def __init__(
        self,
        store: KVStore,
        queries: Array | None = None,
        *,
        neighbours: int = 35,
        max_degree: int = 64,
        query_neighbours: int = 100,
        beam: int = 100,
        ef: int = 128,
        kk_metric: Literal["ip", "l2", "cos"] = "ip",
        index_per: Literal["kv_head", "query_head"] = "kv_head",
        search_by: Literal["head", "mean"] = "head",
        tail_max: int = 1024,
        seed: int = 0,
    ) -> None:
        check_store(store)
        sample = None if queries is None else _sample(queries, store)
        given = {
            "neighbours": neighbours,
            "max_degree": max_degree,
            "query_neighbours": query_neighbours,
            "beam": beam,
            "ef": ef,
            "tail_max": tail_max,
        }
        numbers = {name: integer(value, name) for name, value in given.items()}
        for name, low, high in _RANGES:
            if not low <= numbers[name] <= high:
                raise ValueError(f"{name}: got {numbers[name]}, expected {low} to {high}")
        if numbers["max_degree"] < numbers["neighbours"] + 8:
            raise ValueError(f"max_degree: got {max_degree}, expected at least neighbours + 8 = {neighbours + 8}")
        for name, value, choices in (
            ("kk_metric", kk_metric, ("l2", "ip", "cos")),
            ("index_per", index_per, ("kv_head", "query_head")),
            ("search_by", search_by, ("head", "mean")),
        ):
            one_of(value, name, choices)
        if index_per == "query_head" and sample is None:
            raise ValueError("index_per: got 'query_head' without queries, expected queries, or 'kv_head'")
        handle = _core.graph(
            store._handle,
            sample,
            numbers["neighbours"],
            numbers["max_degree"],
            numbers["query_neighbours"],
            numbers["beam"],
            numbers["ef"],
            kk_metric,
            index_per,
            search_by,
            numbers["tail_max"],
            check_seed(seed),
        )
        self._set(handle, store)


def _sample(queries: Array, store: KVStore) -> NDArray[np.float32]:
    array = as_numpy(queries, "queries")
    if array.dtype not in FLOATS:
        raise TypeError(f"queries: got dtype {array.dtype}, expected float32, float16 or bfloat16")
    if array.ndim != 3 or array.shape[0] % store.kv_heads or array.shape[2] != store.head_dim or 0 in array.shape:
        raise ValueError(
            f"queries: got shape {array.shape}, expected [a multiple of {store.kv_heads}, 1 or more, {store.head_dim}]"
        )
    sample = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(sample).all():
        raise ValueError("queries: got NaN or infinity, expected finite numbers")
    return sample
