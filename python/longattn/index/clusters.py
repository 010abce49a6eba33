"""`Clusters`: k-means clusters of keys, segment by segment."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._checks import flag, integer, one_of
from longattn.index._index import Index, check_seed, check_store
from longattn.index.pages import UNIT_SCORES
from longattn.kv import KVStore


class Clusters(Index):
    """Clusters of similar keys, read or left as a whole.

    Rows come in segments, each with centroids of its own: where positions are rotary, keys of new rows fit old
    centroids badly. Rows after the last whole segment are clustered in parts of `tail` rows, which one clustering of
    the segment replaces when it is full; the last, fewer than `tail`, are read exactly. So every row is clustered at
    most twice, and which rows are clustered together depends on the length of the store alone: the index after any
    appends and truncates is the one that a build from nothing would give.

    A cluster's score for a query `q` (times the softmax scale) is one dot product, as in `Pages`: `"mean"`, the
    mean logit `q . centroid`; `"mean_variance"`, with a quarter of the variance of independent channels added;
    `"bounds"` and `"radius"`, upper bounds of its logits, which only rank. A query group picks clusters by the mean
    over its heads of the share of the softmax that a row of the cluster has (`exp(score)`, the order that gets most
    mass out of a budget of rows), until the budget is full; of the last cluster it takes the first rows. Clusters
    left unread have the weight `size * exp(score)` and the mean of their values. Members among sinks or window do
    not count: scores by means and mean values are of the others.

    Args:
        store: the store to index; it is kept alive.
        segment: rows that are clustered together.
        keys_per_cluster: rows of a cluster, on average: each segment has `segment / keys_per_cluster` clusters, less
            those that come out empty.
        iterations: steps of k-means, fewer where nothing changes any more.
        tail: rows that are clustered together after the last whole segment; divides `segment`. `None` is an eighth of
            the segment where that is a whole number, else the segment.
        spherical: cluster by the angle from the segment's mean key instead of by distance.
        score: see above.
        tables: `"store"`: what is kept of clusters is in the store's dtype (float32 for a store of codes).
            `"int8"`: a byte a number, with a scale for up to 64, so that a pick reads half as much; for the scores by
            means only, as codes are no bounds.
        seed: seed of the first centroids, which are keys drawn at random.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument out of range.

    Cost:
        Memory per cluster and KV head: a row of keys (two for `"mean_variance"` and `"bounds"`) in the store's dtype
        and, where clusters are weighed, one of values; 4 bytes per row and KV head. Building takes
        `segment / keys_per_cluster * (iterations + 1) * head_dim` multiply-adds per row and KV head, up to twice. A
        pick reads all but the lists of rows.

    References:
        Y. Chen et al., "RetroInfer: A Vector-Storage Approach for Scalable Long-Context LLM Inference", 2025,
        arXiv:2505.02922.
    """

    __slots__ = ()

    KIND: ClassVar[str] = "clusters"

    def __init__(
        self,
        store: KVStore,
        segment: int = 8192,
        keys_per_cluster: int = 64,
        *,
        iterations: int = 8,
        tail: int | None = None,
        spherical: bool = False,
        score: Literal["mean", "mean_variance", "bounds", "radius"] = "mean",
        tables: Literal["store", "int8"] = "store",
        seed: int = 0,
    ) -> None:
        check_store(store)
        segment = integer(segment, "segment", 1, 1 << 20)
        if tail is None:
            tail = segment // 8 if segment % 8 == 0 else segment
        tail = integer(tail, "tail", 1, segment)
        if segment % tail:
            raise ValueError(f"tail: got {tail}, expected a divisor of the segment, {segment}")
        keys_per_cluster = integer(keys_per_cluster, "keys_per_cluster", 1, 1 << 20)
        iterations = integer(iterations, "iterations", 0, 1000)
        one_of(score, "score", UNIT_SCORES)
        one_of(tables, "tables", ("store", "int8"))
        seed = check_seed(seed)
        spherical = flag(spherical, "spherical")
        handle = _core.clusters(
            store._handle,
            segment,
            tail,
            keys_per_cluster,
            iterations,
            spherical,
            score,
            tables == "int8",
            seed,
        )
        self._set(handle, store)

    @property
    def score(self) -> str:
        """How clusters are scored."""
        return str(self.parameters["score"])

    def members(self, head: int) -> list[NDArray[np.uint32]]:
        """Rows of each cluster of a KV head, ascending; of the rows indexed so far.

        Args:
            head: KV head.

        Raises:
            ValueError: no such head.
        """
        head = integer(head, "head", 0, self.store.kv_heads - 1)
        return [np.asarray(rows, np.uint32) for rows in _core.clusters_members(self._handle, head)]
