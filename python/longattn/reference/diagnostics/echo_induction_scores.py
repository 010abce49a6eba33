"""Echo and induction scores from explicit weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention_weights import attention_weights


def echo_induction_scores(
    q: ArrayLike, k: ArrayLike, period: int, *, scale: float | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """See `longattn.diagnostics.echo_induction_scores`."""
    length = np.asarray(k).shape[-2]
    p = attention_weights(q, k, range(length), causal=True, scale=scale)
    echo, induction = np.zeros((2, len(p), length - period))
    for i in range(period, length):
        for j in range(i % period, i, period):
            echo[:, i - period] += p[:, i, j]
            induction[:, i - period] += p[:, i, j + 1] if j + 1 < i else 0.0
    return echo.mean(axis=1), induction.mean(axis=1)
