"""MagicPIG: attention estimated from rows that hash tables draw."""

from __future__ import annotations

from longattn._arrays import Array
from longattn._checks import integer
from longattn.index.lsh_tables import LshTables
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference import retrieval as reference
from longattn.retrieval.retrieval_attention import RetrievalResult, retrieval_attention


def magicpig_attention(
    q: Array,
    store: KVStore,
    index: LshTables,
    *,
    sinks: int = 4,
    window: int = 64,
    scale: float | None = None,
    limit: int | None = None,
    sink_logits: Array | None = None,
    return_stats: bool = True,
    return_selected: bool = False,
) -> RetrievalResult:
    """Causal attention to sinks, window, and the rows that share a bucket of at least two hash tables with a query.

    A row that a query head meets so has the chance u of `LshTables`, and its logit is raised by `-ln u`. Numerator and
    denominator of the softmax are then unbiased over the tables' directions, and their quotient nearly so
    (self-normalised importance sampling). Each query head uses its own rows; a row that any head of a group uses is
    read once.

    Args:
        q: queries `[Hq, Lq, D]` or `[1, Hq, Lq, D]`, at the last positions of the store; float32, float16 or bfloat16.
        store: keys and values; at least `Lq` rows.
        index: tables of that store. Brought up to date first.
        sinks: first rows that are always read, with weight 1.
        window: last rows that are always read, with weight 1.
        scale: factor of the logits; `None` is `D ** -0.5`.
        limit: most rows to read per KV head, beside sinks and window: beyond it, those met in the fewest tables are
            left out, and the estimate is biased. `None` is no limit.
        sink_logits: floating `[Hq]`: an extra logit per head that takes part in the denominator only.
        return_stats: return what was read. `missed_mass` and its bound are 1 wherever rows were left out: it is not
            known how much of the mass they would hold.
        return_selected: also list the rows that were drawn in the statistics.

    Returns:
        A `RetrievalResult`. Where a query sees neither sinks nor window and meets no row, its output is 0 and its lse
        minus infinity.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: as `retrieval_attention`, and a limit below 1.

    Cost:
        `D * tables * bits` multiply-adds per query head to hash it, two bytes per row met in any table, and the rows
        that are read, keys twice.

    References:
        Z. Chen et al., "MagicPIG: LSH Sampling for Efficient LLM Generation", 2024, arXiv:2410.16179.
    """
    if not isinstance(index, LshTables):
        raise TypeError(f"index: got {type(index).__name__}, expected an LshTables")
    most = None if limit is None else integer(limit, "limit", 1)
    return retrieval_attention(
        q,
        store,
        index,
        top_k=max(1, len(store)) if most is None and isinstance(store, KVStore) else most,
        sinks=sinks,
        window=window,
        scale=scale,
        rest="none",
        sink_logits=sink_logits,
        return_stats=return_stats,
        return_selected=return_selected,
    )


METHOD = Method(
    name="magicpig_attention",
    family="hash",
    title="MagicPIG: LSH Sampling for Efficient LLM Generation",
    year=2024,
    arxiv="2410.16179",
    function=magicpig_attention,
    reference=reference.magicpig_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "With 0 bits every row is met and weighs 1: causal attention.",
        "Over seeds, the mean of `e^lse` and of `e^lse * out` is that of causal attention.",
        "Rows are met as often as the formula says.",
        "Queries multiplied by a positive number, with the scale divided by it, meet the same rows.",
        "All keys moved by one vector: the same rows are met, and the output stays.",
        "Equal keys are met together.",
    ),
    tests="tests/retrieval/test_magicpig_attention.py",
    cost="`D * tables * bits` multiply-adds per query head, what its buckets hold, and the rows that are read.",
)
