"""RetroInfer: the best clusters of keys exactly, the others by their centroids."""

from __future__ import annotations

from longattn._arrays import Array
from longattn.index import Clusters
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference import retrieval as reference
from longattn.retrieval._budgets import index_of, length_of, rows_of
from longattn.retrieval.retrieval_attention import RetrievalResult, retrieval_attention


def retro_infer_attention(
    q: Array,
    store: KVStore,
    index: Clusters,
    *,
    retrieved: float = 0.018,
    sinks: int = 4,
    window: int = 64,
    scale: float | None = None,
    sink_logits: Array | None = None,
    return_stats: bool = True,
    return_selected: bool = False,
) -> RetrievalResult:
    """Causal attention of the newest queries in three zones.

    - Steady zone: the first `sinks` and the last `window` rows, and rows that are not clustered yet, exactly.
    - Retrieval zone: the clusters of keys whose centroids have the largest logits, exactly, until `retrieved` of the
      store's rows are read.
    - Estimation zone: all other clusters. One of n keys with the centroid c weighs `n * exp(q . c)`, with the mean of
      its values. As `exp` is convex that is too little, the less the tighter clusters are.

    One list of clusters serves the query group of a KV head, ranked by the mean over its heads of the centroid's
    share of the softmax. The paper estimates the next 23.2 % of the clusters and leaves the others out; here all are
    estimated, which reads the same centroids and errs less. Its clusters have 16 keys on average, by spherical k-means
    of 10 steps in segments of 8,192 tokens: `Clusters(store, 8192, 16, iterations=10, spherical=True)`.

    Args:
        q: queries `[Hq, Lq, D]` or `[1, Hq, Lq, D]`, the last positions of the store; float32, float16 or bfloat16.
        store: keys and values; at least `Lq` rows.
        index: `Clusters` of that store, scored by "mean" or "mean_variance". Brought up to date first.
        retrieved: share of the store's rows to read in the retrieval zone.
        sinks: first rows that are always read.
        window: last rows that are always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        sink_logits: floating `[Hq]`: an extra logit per head that takes part in the denominator only.
        return_stats: return what was read and missed.
        return_selected: also list the selected rows in the statistics.

    Returns:
        A `RetrievalResult`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit the store, an index of another store or with a score that estimates nothing,
            a share out of range, or a store with fewer rows than queries.

    Cost:
        A row of keys and one of values per cluster and KV head, and the rows read. New segments are clustered first.

    References:
        Y. Chen et al., "RetroInfer: A Vector-Storage Approach for Scalable Long-Context LLM Inference", 2025,
        arXiv:2505.02922.
    """
    clusters = index_of(index, Clusters)
    if not clusters.estimates:
        raise ValueError(f"index: got clusters scored by {clusters.score!r}, expected 'mean' or 'mean_variance'")
    rows = length_of(store)
    return retrieval_attention(
        q,
        store,
        clusters,
        top_k=rows_of(retrieved, "retrieved", rows),
        sinks=sinks,
        window=window,
        scale=scale,
        rest="values",
        sink_logits=sink_logits,
        return_stats=return_stats,
        return_selected=return_selected,
    )


METHOD = Method(
    name="retro_infer_attention",
    family="retrieval",
    title="RetroInfer: A Vector-Storage Approach for Scalable Long-Context LLM Inference",
    year=2025,
    arxiv="2505.02922",
    function=retro_infer_attention,
    reference=reference.retro_infer_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A budget of every row is causal attention.",
        "Clusters of equal keys make the result causal attention, whatever is read.",
        "As many clusters as rows make the result causal attention.",
        "`lse` is what `merge` needs: two halves of the keys make the whole.",
    ),
    tests="tests/retrieval/test_retro_infer_attention.py",
    cost="A row of keys and one of values per cluster and KV head, and the rows that are read.",
)
