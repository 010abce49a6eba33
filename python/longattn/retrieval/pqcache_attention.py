"""PQCache: the rows whose product codes promise the largest logits."""

from __future__ import annotations

from longattn._arrays import Array
from longattn.index import ProductQuantisation
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference import retrieval as reference
from longattn.retrieval._budgets import index_of, length_of, rows_of
from longattn.retrieval.retrieval_attention import RetrievalResult, retrieval_attention


def pqcache_attention(
    q: Array,
    store: KVStore,
    index: ProductQuantisation,
    *,
    retrieved: float = 0.1,
    sinks: int = 4,
    window: int = 64,
    scale: float | None = None,
    return_stats: bool = True,
    return_selected: bool = False,
) -> RetrievalResult:
    """Causal attention of the newest queries to the rows that rank highest by product codes.

    Each subvector of a key is the nearest of a few centroids; the logit that a row's centroids give ranks it. The
    best rows are read with the first and last ones, and everything else is left out of the softmax. To have it
    estimated instead, call `retrieval_attention` with the same index.

    One list of rows serves the query group of a KV head: rows are ranked by the mean over its heads of the share of
    the softmax that their codes give. The paper cuts keys in 2 subvectors of 6 bits; the indexes here have 4 or 8
    bits, by default 4 for every 8 dimensions, which rank better and are scanned in vector registers.

    Args:
        q: queries `[Hq, Lq, D]` or `[1, Hq, Lq, D]`, the last positions of the store; float32, float16 or bfloat16.
        store: keys and values; at least `Lq` rows.
        index: `ProductQuantisation` of that store. Brought up to date first.
        retrieved: share of the store's rows to read by their codes; the paper has a fifth or a tenth.
        sinks: first rows that are always read.
        window: last rows that are always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        return_stats: return what was read and missed.
        return_selected: also list the selected rows in the statistics.

    Returns:
        A `RetrievalResult`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit the store, an index of another store, a share out of range, or a store with
            fewer rows than queries.

    Cost:
        `subvectors * bits / 8` bytes per row and KV head, and the rows read. New rows are coded first.

    References:
        H. Zhang et al., "PQCache: Product Quantization-based KVCache for Long Context LLM Inference", 2024,
        arXiv:2407.12820.
    """
    rows = length_of(store)
    return retrieval_attention(
        q,
        store,
        index_of(index, ProductQuantisation),
        top_k=rows_of(retrieved, "retrieved", rows),
        sinks=sinks,
        window=window,
        scale=scale,
        rest="none",
        return_stats=return_stats,
        return_selected=return_selected,
    )


METHOD = Method(
    name="pqcache_attention",
    family="retrieval",
    title="PQCache: Product Quantization-based KVCache for Long Context LLM Inference",
    year=2024,
    arxiv="2407.12820",
    function=pqcache_attention,
    reference=reference.pqcache_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A budget of every row is causal attention.",
        "Where every key is a product of centroids the rows are the exact top-k.",
        "Over the rows that were read the result is their softmax.",
        "Several queries read what a step for each reads.",
    ),
    tests="tests/retrieval/test_pqcache_attention.py",
    cost="`subvectors * bits / 8` bytes per row and KV head, and the rows that are read.",
)
