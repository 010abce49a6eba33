"""HATA: exact attention to the keys whose hash codes are nearest to the queries'."""

from __future__ import annotations

import math

from longattn._arrays import Array
from longattn._checks import integer, real
from longattn.index.hashes import Hashes
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference import retrieval as reference
from longattn.retrieval.retrieval_attention import RetrievalResult, retrieval_attention


def hata_topk_attention(
    q: Array,
    store: KVStore,
    index: Hashes,
    *,
    top_k: int | float = 0.0156,
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
    sink_logits: Array | None = None,
    return_stats: bool = True,
    return_selected: bool = False,
) -> RetrievalResult:
    """Causal attention to sinks, window, and the rows of smallest Hamming distance to the query group.

    The distance of a row is the sum over the group's query heads of the bits in which its code differs from theirs
    (`Hashes`); with `use_norm` the rows of largest `(1 - 2 distance / (heads * bits)) * |k|` are taken. Ties go to the
    lower row. The softmax over the rows that are read is exact; the others are left out of it. The published models
    keep their first two layers dense.

    Args:
        q: queries `[Hq, Lq, D]` or `[1, Hq, Lq, D]`, at the last positions of the store; float32, float16 or bfloat16.
        store: keys and values; at least `Lq` rows.
        index: codes of that store. Brought up to date first.
        top_k: rows to select per KV head, beside sinks and window: a number of rows, or a share of the store's rows
            above 0 and below 1, rounded up.
        sinks: first rows that are always read.
        window: last rows that are always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        sink_logits: floating `[Hq]`: an extra logit per head that takes part in the denominator only.
        return_stats: return what was read. `missed_mass` and its bound are 1 wherever rows were left out: codes do not
            say.
        return_selected: also list the selected rows in the statistics.

    Returns:
        A `RetrievalResult`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: as `retrieval_attention`.

    Cost:
        `code_bits / 8` bytes per row and KV head for the scan, and the rows that are read.

    References:
        P. Gong et al., "HATA: Trainable and Hardware-Efficient Hash-Aware Top-k Attention for Scalable Large Model
        Inference", 2025, arXiv:2506.02572.
    """
    if not isinstance(index, Hashes):
        raise TypeError(f"index: got {type(index).__name__}, expected a Hashes")
    return retrieval_attention(
        q,
        store,
        index,
        top_k=_rows(top_k, store),
        sinks=sinks,
        window=window,
        scale=scale,
        rest="none",
        sink_logits=sink_logits,
        return_stats=return_stats,
        return_selected=return_selected,
    )


def _rows(top_k: int | float, store: KVStore) -> int:
    """A budget as a number of rows."""
    if not isinstance(top_k, float):
        return integer(top_k, "top_k", 1)
    share = real(top_k, "top_k")
    if not 0 < share < 1:
        raise ValueError(f"top_k: got {top_k}, expected a number of rows, or a share of them above 0 and below 1")
    return max(1, math.ceil(share * len(store))) if isinstance(store, KVStore) else 1


METHOD = Method(
    name="hata_topk_attention",
    family="hash",
    title="HATA: Trainable and Hardware-Efficient Hash-Aware Top-k Attention for Scalable Large Model Inference",
    year=2025,
    arxiv="2506.02572",
    function=hata_topk_attention,
    reference=reference.hata_topk_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A budget of every row is causal attention.",
        "The distance of a vector's code to itself is 0, to that of its opposite every bit (but for products of 0).",
        "Without norms, keys multiplied by positive numbers are ranked as before.",
        "The distance from packed codes is that of the unpacked bits.",
        "With the identity as weights the distance counts the signs that disagree.",
    ),
    tests="tests/retrieval/test_hata_topk_attention.py",
    cost="`code_bits / 8` bytes per row and KV head for the scan of codes, and the rows that are read.",
)
