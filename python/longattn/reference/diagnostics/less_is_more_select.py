"""The list of LessIsMore from its rule."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def less_is_more_select(
    scores: ArrayLike, budget: int, *, recent_ratio: float = 0.25, sinks: int = 4
) -> NDArray[np.int64]:
    """See `longattn.diagnostics.less_is_more_select`."""
    scores = np.asarray(scores, np.float64)
    heads, keys = scores.shape
    if budget >= keys:
        return np.arange(keys)
    share = int(budget * recent_ratio + 1e-9)
    middle = range(sinks, keys - (share - sinks))
    ranked = [sorted(middle, key=lambda key, row=row: (-row[key], key)) for row in scores]  # type: ignore[misc]
    union: list[int] = []
    for rank in range(len(middle)):
        for head in range(heads):
            if len(union) < budget - share and ranked[head][rank] not in union:
                union.append(ranked[head][rank])
    return np.array(sorted([*range(sinks), *union, *range(keys - (share - sinks), keys)]))
