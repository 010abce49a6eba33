"""MoBA's gate from its formula: float64 numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.sparse.choosing import fewest, means


def moba_select(
    q: ArrayLike, k: ArrayLike, *, block: int = 512, top_k: int = 3, causal: bool = True
) -> NDArray[np.bool_]:
    """Which blocks each query takes, `[B, Hq, Lq, blocks]`; see `longattn.sparse.moba_select`."""
    q = np.asarray(q, np.float64)
    of_k = means(k, block)
    of_k = np.repeat(of_k, q.shape[1] // of_k.shape[1], axis=1)
    gate = q @ of_k.swapaxes(-1, -2)
    kept = np.zeros(gate.shape, bool)
    for b, h, i in np.ndindex(*gate.shape[:3]):
        position = i + np.shape(k)[2] - gate.shape[2]
        own = position // block
        limit = (own + 1 if causal else gate.shape[3]) if position >= 0 else (0 if causal else gate.shape[3])
        here = (np.arange(limit) == own) & (position >= 0)
        kept[b, h, i, :limit] = fewest(gate[b, h, i, :limit], 0.0, here, least=top_k, most=top_k)
    return kept
