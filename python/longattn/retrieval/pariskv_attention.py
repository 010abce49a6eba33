"""ParisKV: exact attention to keys that sign patterns vote for and 4-bit codes rank."""

from __future__ import annotations

from longattn._arrays import Array
from longattn.index.collisions import Collisions
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference import retrieval as reference
from longattn.retrieval.retrieval_attention import RetrievalResult, retrieval_attention


def pariskv_attention(
    q: Array,
    store: KVStore,
    index: Collisions,
    *,
    top_k: int = 100,
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
    sink_logits: Array | None = None,
    return_stats: bool = True,
    return_selected: bool = False,
) -> RetrievalResult:
    """Causal attention to sinks, window, and the rows that `Collisions` pick for the mean query of the group.

    The rows whose sign patterns get most votes are candidates; those of the largest products by their 4-bit codes are
    read, and the softmax over the rows that are read is exact. The others are left out of it. Ties go to the lower row.

    Args:
        q: queries `[Hq, Lq, D]` or `[1, Hq, Lq, D]`, at the last positions of the store; float32, float16 or bfloat16.
        store: keys and values; at least `Lq` rows.
        index: sign patterns and codes of that store. Brought up to date first.
        top_k: rows to select per KV head, beside sinks and window. There are at least as many candidates.
        sinks: first rows that are always read.
        window: last rows that are always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        sink_logits: floating `[Hq]`: an extra logit per head that takes part in the denominator only.
        return_stats: return what was read. `missed_mass` and its bound are 1 wherever rows were left out: votes do not
            say.
        return_selected: also list the selected rows in the statistics.

    Returns:
        A `RetrievalResult`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: as `retrieval_attention`.

    Cost:
        `D / 8` bytes per row and KV head for the votes, `D / 2 + 4` bytes per candidate, and the rows that are read.

    References:
        Y. Qi et al., "ParisKV: Fast and Drift-Robust KV-Cache Retrieval for Long-Context LLMs", 2026, arXiv:2602.07721.
    """
    if not isinstance(index, Collisions):
        raise TypeError(f"index: got {type(index).__name__}, expected a Collisions")
    return retrieval_attention(
        q,
        store,
        index,
        top_k=top_k,
        sinks=sinks,
        window=window,
        scale=scale,
        rest="none",
        sink_logits=sink_logits,
        return_stats=return_stats,
        return_selected=return_selected,
    )


METHOD = Method(
    name="pariskv_attention",
    family="hash",
    title="ParisKV: Fast and Drift-Robust KV-Cache Retrieval for Long-Context LLMs",
    year=2026,
    arxiv="2602.07721",
    function=pariskv_attention,
    reference=reference.pariskv_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A budget of every row is causal attention.",
        "A group of equal queries selects what one of them does.",
        "Queries multiplied by a positive number select the same rows.",
        "When every key is a candidate, the codes alone select.",
        "Keys in pairs of opposites: the opposites of what a query selects are what the opposite query selects.",
    ),
    tests="tests/retrieval/test_pariskv_attention.py",
    cost="`D / 8` bytes per row and KV head for the votes, `D / 2 + 4` per candidate, and the rows that are read.",
)
