"""How much of what an exact scan would have read a call did read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import items_of

Lists = Sequence[Sequence[NDArray[np.uint32]]]


def recall(selected: Lists, exact: Lists) -> NDArray[np.float64]:
    """Share of the rows that an exact scan picks among those that were picked (recall@k).

    Args:
        selected: `[Hkv][Lq]` lists of rows, `RetrievalStats.selected` of a call.
        exact: the same of a call with `longattn.index.Flat` and the same budget.

    Returns:
        float64 `[Hkv, Lq]`; 1 where the exact list is empty.

    Raises:
        ValueError: lists of different heads or queries.

    Cost:
        A sort of each list.
    """
    for lists, name in ((selected, "selected"), (exact, "exact")):
        for of_head in items_of(lists, name, "lists per head"):
            items_of(of_head, name, "lists per query")
    if len(selected) != len(exact) or any(len(a) != len(b) for a, b in zip(selected, exact, strict=False)):
        raise ValueError(
            f"selected: got {[len(a) for a in selected]} lists per head, expected {[len(b) for b in exact]} as in exact"
        )
    shares = [
        [float(np.isin(best, found).mean()) if len(best) else 1.0 for found, best in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(selected, exact, strict=True)
    ]
    return np.array(shares, np.float64).reshape(len(shares), len(exact[0]) if shares else 0)


def recovery_ratio(lse: Array, full_lse: Array) -> NDArray[np.float64]:
    """Share of the softmax mass that lies in the rows that were read.

    Args:
        lse: `lse` of a call of `retrieval_attention` with `rest="none"`, without sink logits.
        full_lse: `lse` of attention over all rows, of the same shape.

    Returns:
        float64 of that shape: `exp(lse - full_lse)`; rounding can lift it slightly above 1.

    Raises:
        ValueError: different shapes.

    Cost:
        One exponential per query.
    """
    ours, full = as_numpy(lse, "lse"), as_numpy(full_lse, "full_lse")
    if ours.shape != full.shape:
        raise ValueError(f"lse: got shape {ours.shape}, expected {full.shape} as of full_lse")
    return np.exp(ours.astype(np.float64) - full.astype(np.float64))
