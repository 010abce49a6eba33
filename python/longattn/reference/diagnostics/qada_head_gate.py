"""QAdA from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention


def qada_share(q: ArrayLike, k: ArrayLike, local: ArrayLike, scale: float | None = None) -> NDArray[np.float64]:
    """Estimated share of the local keys, `[Hq]`, for queries `[Hq, D]`, keys `[Hkv, L, D]` and a boolean `[L]`."""
    q, k, local = np.asarray(q, np.float64), np.asarray(k, np.float64), np.asarray(local)
    factor = q.shape[1] ** -0.5 if scale is None else scale
    share = np.ones(len(q))
    for h, query in enumerate(q):
        keys = k[h // (len(q) // len(k))]
        bulk = keys[~local]
        if len(bulk):
            sigma = np.cov(bulk, rowvar=False, bias=True).reshape(len(query), len(query))
            near = np.log(np.exp(factor * keys[local] @ query).sum())
            far = np.log(len(bulk)) + factor * query @ bulk.mean(axis=0) + 0.5 * factor**2 * query @ sigma @ query
            share[h] = 1 / (1 + np.exp(far - near))
    return share


def qada_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    tau: float = 0.9,
    sinks: int = 16,
    local: int = 1024,
    any_of_group: bool = True,
    scale: float | None = None,
    **_: Any,
) -> NDArray[np.float64]:
    """See `longattn.diagnostics.qada_attention`; moments are those of the other keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    length = k.shape[1]
    j = np.arange(length)
    near = (j < sinks) | (j >= length - local)
    is_local = (qada_share(q[:, 0], k, near, scale) >= tau) | near.all()
    if any_of_group:
        is_local = np.repeat(is_local.reshape(len(k), -1).all(axis=1), len(q) // len(k))
    few = attention(q, k, v, mask=near, scale=scale)
    out: NDArray[np.float64] = np.where(is_local[:, None, None], few, attention(q, k, v, scale=scale))
    return out
