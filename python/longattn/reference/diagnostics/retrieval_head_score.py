"""Retrieval head scores from their definition: sets of tokens, head by head."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def retrieval_head_score(
    top: ArrayLike, tokens: ArrayLike, emitted: ArrayLike, needle: tuple[int, int], *, unique: bool = True
) -> NDArray[np.float64]:
    """See `longattn.diagnostics.retrieval_head_score`."""
    keys = np.asarray(top)
    context: list[int] = np.asarray(tokens).tolist()
    answer: list[int] = np.asarray(emitted).tolist()
    if keys.ndim < 4:
        keys = keys[..., None]
    source = set(context[needle[0] : needle[1]])
    scores = np.zeros(keys.shape[1:-1])
    for head in np.ndindex(*scores.shape):
        copied = []
        for step, token in enumerate(answer):
            for key in keys[(step, *head)]:
                if needle[0] <= key < needle[1] and context[key] == token:
                    copied.append(token)
                    break
        scores[head] = len(set(copied)) / len(source) if unique else len(copied) / (needle[1] - needle[0])
    return scores
