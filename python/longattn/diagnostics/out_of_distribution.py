"""How far queries lie from the distribution of the keys."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import FLOATS, Array, as_numpy
from longattn._checks import finite


def mahalanobis(q: Array, k: Array, *, ridge: float = 1e-6) -> NDArray[np.float64]:
    """Mahalanobis distance of each query from the keys of its head.

    `sqrt((q - m)^T C^-1 (q - m))` with mean `m` and covariance `C` of the keys. Keys themselves have a root mean
    square of `sqrt(D)` (the rank of `C`, where that is lower); queries of trained models lie several times as far,
    which is why indexes built from keys alone find them badly.

    Args:
        q: floating `[Hq, n, D]`.
        k: floating `[Hkv, N, D]`, `Hq` a multiple of `Hkv`, at least two keys.
        ridge: added to the diagonal of `C`, as a share of its mean: keys that span fewer dimensions have no inverse
            covariance, and what lies outside their span counts as very far.

    Returns:
        float64 `[Hq, n]`; infinite where the keys of a head are all equal and the query is another point.

    Raises:
        TypeError: arrays of another dtype.
        ValueError: shapes that do not fit, numbers that are not finite, or a ridge that is not positive.

    Cost:
        `N * D^2 + D^3` multiply-adds per KV head and `D^2` per query, in float64; a copy of `k` in float64.

    References:
        P. C. Mahalanobis, "On the Generalised Distance in Statistics", 1936; used for queries of attention by D. Liu
        et al., "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval", 2024 (arXiv
        2409.10516).
    """
    queries, keys = as_numpy(q, "q"), as_numpy(k, "k")
    for name, x in (("q", queries), ("k", keys)):
        if x.dtype not in (*FLOATS, np.float64):
            raise TypeError(f"{name}: got dtype {x.dtype}, expected float32, float16, bfloat16 or float64")
        if x.ndim != 3 or x.shape[-1] == 0:
            raise ValueError(f"{name}: got shape {x.shape}, expected [heads, rows, D]")
    if keys.shape[0] == 0 or keys.shape[1] < 2:
        raise ValueError(f"k: got shape {keys.shape}, expected at least one head and two keys")
    if queries.shape[0] % keys.shape[0] or queries.shape[2] != keys.shape[2]:
        raise ValueError(f"q: got shape {queries.shape}, expected [a multiple of {keys.shape[0]}, n, {keys.shape[2]}]")
    if finite(ridge, "ridge") <= 0:
        raise ValueError(f"ridge: got {ridge}, expected a positive number")
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    for name, x in (("q", queries), ("k", keys)):
        if not np.isfinite(x).all():
            raise ValueError(f"{name}: got NaN or infinity, expected finite numbers")
    group, dim = queries.shape[0] // keys.shape[0], keys.shape[2]
    out = np.empty(queries.shape[:2])
    for h, of_head in enumerate(keys):
        centred = of_head - of_head.mean(0)
        covariance = centred.T @ centred / len(of_head)
        mean_variance = np.trace(covariance) / dim
        away = queries[h * group : (h + 1) * group] - of_head.mean(0)
        if mean_variance == 0:
            out[h * group : (h + 1) * group] = np.where((away == 0).all(-1), 0.0, np.inf)
            continue
        covariance += np.eye(dim) * ridge * mean_variance
        factor = np.linalg.cholesky(covariance)
        whitened = np.linalg.solve(factor, away.reshape(-1, dim).T)
        out[h * group : (h + 1) * group] = np.sqrt((whitened**2).sum(0)).reshape(group, away.shape[1])
    return out
