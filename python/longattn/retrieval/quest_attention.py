"""Quest: whole pages, picked by an upper bound of their logits."""

from __future__ import annotations

from longattn._arrays import Array
from longattn._checks import integer
from longattn.index import Pages
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference import retrieval as reference
from longattn.retrieval._budgets import index_of
from longattn.retrieval.retrieval_attention import RetrievalResult, retrieval_attention


def quest_attention(
    q: Array,
    store: KVStore,
    index: Pages,
    *,
    token_budget: int = 1024,
    sinks: int = 0,
    window: int = 16,
    scale: float | None = None,
    return_stats: bool = True,
    return_selected: bool = False,
) -> RetrievalResult:
    """Causal attention of the newest queries to the pages whose keys may matter most.

    A page of keys has the score `sum_d max(q_d min_d, q_d max_d)`, with the smallest and the largest number of each
    channel among its keys: no logit of the page lies above it. The pages of the largest scores are read, everything
    else is left out of the softmax. Because the scores are bounds, so is what they say of the mass that was missed:
    `stats.missed_mass_bound` always holds, and is loose.

    One list of pages serves the query group of a KV head: pages are ranked by the mean over its heads of their
    bounded share of the softmax. (The paper has one list for each head, and reads all of the first two layers, which
    is the caller's choice here.) Rows of an unfinished page and the `window` newest ones are always read; UNSURE: the
    paper does not say whether the newest page is.

    Args:
        q: queries `[Hq, Lq, D]` or `[1, Hq, Lq, D]`, the last positions of the store; float32, float16 or bfloat16.
        store: keys and values; at least `Lq` rows.
        index: `Pages(store, page_size, "bounds")`; the paper's pages have 16 rows. Brought up to date first.
        token_budget: rows of the pages that are read, beside sinks and window; whole pages, at least one.
        sinks: first rows that are always read.
        window: last rows that are always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        return_stats: return what was read and missed.
        return_selected: also list the selected rows in the statistics.

    Returns:
        A `RetrievalResult`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit the store, an index of another store or with another score, budgets out of
            range, or a store with fewer rows than queries.

    Cost:
        `2 * D` numbers per page and KV head, and the rows read.

    References:
        J. Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024,
        arXiv:2406.10774.
    """
    pages = index_of(index, Pages)
    if pages.score != "bounds":
        raise ValueError(f"index: got pages scored by {pages.score!r}, expected 'bounds'")
    budget = integer(token_budget, "token_budget", 1)
    return retrieval_attention(
        q,
        store,
        pages,
        top_k=max(budget // pages.page_size, 1) * pages.page_size,
        sinks=sinks,
        window=window,
        scale=scale,
        rest="none",
        return_stats=return_stats,
        return_selected=return_selected,
    )


METHOD = Method(
    name="quest_attention",
    family="retrieval",
    title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    year=2024,
    arxiv="2406.10774",
    function=quest_attention,
    reference=reference.quest_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A budget of every row is causal attention.",
        "The score of a page is at least each of its logits, and the missed mass at most its bound.",
        "Pages of one row are exact top-k.",
        "Several queries read what a step for each reads.",
    ),
    tests="tests/retrieval/test_quest_attention.py",
    cost="`2 * D` numbers per page and KV head, and the rows that are read.",
)
