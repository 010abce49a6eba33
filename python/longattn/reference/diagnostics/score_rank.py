"""Singular values of whole score matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def score_rank(q: Any, k: Any, *, tolerance: float = 1e-6) -> tuple[Float64, NDArray[np.int64], Float64]:
    """See `longattn.diagnostics`: all singular values of `q k^T`, of which `D` are not 0, rank and effective rank."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    k = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
    values = np.linalg.svd(q @ k.swapaxes(-1, -2), compute_uv=False)
    rank = np.array((values > tolerance * values[..., :1]).sum(axis=-1))
    effective = np.zeros(values.shape[:-1])
    for at in np.ndindex(effective.shape):
        shares = values[at][values[at] > 1e-13 * values[at].max()]
        shares = shares / shares.sum() if len(shares) else shares
        effective[at] = np.exp(-(shares * np.log(shares)).sum()) if len(shares) else 0.0
    return values, rank, effective
