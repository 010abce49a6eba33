"""LessIsMore: one list of tokens for all heads, made in a few layers and used by those after them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, integer, real
from longattn.dense.attention import attention
from longattn.dense.attention_weights import attention_weights
from longattn.dense.listed_attention import listed_attention
from longattn.methods import Method
from longattn.pictures import example
from longattn.reference import diagnostics as reference


def less_is_more_select(scores: Array, budget: int, *, recent_ratio: float = 0.25, sinks: int = 4) -> NDArray[np.int64]:
    """The tokens that all heads read in this step: sinks, recent ones, and what the heads' rankings agree on.

    Of `budget` tokens a share `recent_ratio` are sinks and recent ones, the others are picked from the middle: every
    head ranks the tokens there by its score; rankings are read rank by rank (every head's first in the order of heads,
    then every head's second), and the first distinct tokens are taken.

    Args:
        scores: floating `[Hq, Lk]`: logits or weights of the step's query, as `attention_weights` gives them.
        budget: tokens of the list; all, where there are no more.
        recent_ratio: share of the budget for sinks and recent tokens, 0 to 1, rounded down.
        sinks: first tokens that are in the list, at most that share.

    Returns:
        Positions, ascending, int64 `[min(budget, Lk)]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        A selection of the best scores of each head, `O(Hq * Lk)`, and a sort of them. Lists go to
        `longattn.dense.listed_attention`, or through `less_is_more_attention`.

    References:
        "Less Is More: Training-Free Sparse Attention with Global Locality for Efficient Reasoning", 2025,
        arXiv:2508.07101.

    Example:
        >>> import numpy as np, longattn as la
        >>> scores = np.array([[0, 9, 1, 8, 2, 0, 0, 0.0], [0, 9, 7, 1, 8, 0, 0, 0]])
        >>> la.diagnostics.less_is_more_select(scores, 5, recent_ratio=0.4, sinks=1)
        array([0, 1, 3, 4, 7])
    """
    x = as_numpy(scores, "scores")
    check_floating(x, "scores")
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"scores: got shape {x.shape}, expected [Hq, Lk]")
    budget, sinks = integer(budget, "budget", 1), integer(sinks, "sinks", 0)
    if not 0 <= real(recent_ratio, "recent_ratio") <= 1:
        raise ValueError(f"recent_ratio: got {recent_ratio}, expected 0 to 1")
    share = int(budget * recent_ratio + 1e-9)
    keys = x.shape[1]
    if budget >= keys:
        return np.arange(keys)
    if sinks > share:
        raise ValueError(f"sinks: got {sinks}, expected at most {share}, their share of the budget")
    last = keys - (share - sinks)
    middle = _core.rank_union(np.ascontiguousarray(x, np.float32), sinks, last, budget - share)
    return np.concatenate([np.arange(sinks), middle.astype(np.int64), np.arange(last, keys)])


def less_is_more_attention(
    q: Array, k: Array, v: Array, selected: Array | None = None, *, budget: int = 2048, **options: Any
) -> tuple[Array, NDArray[np.int64]]:
    """A decode step of a layer that selects, or of one that uses what an earlier layer selected.

    Args:
        q: queries `[Hq, 1, D]` of the last position; float32, float16 or bfloat16.
        k: keys `[Hkv, L, D]`; likewise, or the `keys` of a `KVStore` of codes.
        v: values `[Hkv, L, Dv]`; dtype of `k`.
        selected: positions from an earlier layer of the same step; `None` selects here: attention is full then.
        budget: tokens of the list that is made.
        options: `recent_ratio` and `sinks` of `less_is_more_select`, `scale` and `softcap` of the attention.

    Returns:
        The output `[Hq, 1, Dv]`, and the positions, for the layers that follow.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Selecting: full attention, its logits once more, and the selection. Else that of `listed_attention`.
    """
    choice = {name: options.pop(name) for name in ("recent_ratio", "sinks") if name in options}
    if selected is not None:
        rows = as_numpy(selected, "selected")
        return listed_attention(q, k, v, rows, **options), rows.astype(np.int64)
    out = attention(q, k, v, **options)
    weights = as_numpy(attention_weights(q, k, rows=[0], **options), "weights")
    return out, less_is_more_select(weights[:, 0], budget, **choice)


def _example() -> NDArray[np.bool_]:
    """What each step reads that chooses for itself, of two heads."""
    q, k = (x[0].astype(np.float64) for x in example(heads=2))
    mask = np.zeros((128, 128), bool)
    for step, scores in enumerate((q @ k.swapaxes(-1, -2)).swapaxes(0, 1)):
        mask[step, less_is_more_select(np.ascontiguousarray(scores[:, : step + 1]), 24)] = True
    return mask


METHOD = Method(
    name="less_is_more_select",
    family="sparse",
    title="Less Is More: Training-Free Sparse Attention with Global Locality for Efficient Reasoning",
    year=2025,
    arxiv="2508.07101",
    function=less_is_more_select,
    reference=reference.less_is_more_select,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    prefill=False,
    checks=(
        "A budget of all tokens gives dense attention.",
        "With one head the list is its best tokens, sinks and recent ones.",
        "The list has exactly the budget's size and holds sinks and recent tokens.",
        "Heads of equal scores give the list of one of them.",
    ),
    tests="tests/diagnostics/test_less_is_more_select.py",
    cost="A selecting layer: full attention, its logits once more, `Hq * Lk` to select. Others read `budget` rows.",
    mask=_example,
)
