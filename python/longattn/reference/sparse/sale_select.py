"""SALE from its formulas: float64 numpy with materialised scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention

_Float64 = NDArray[np.float64]


def _rounded(x: _Float64, levels: float) -> _Float64:
    """Rows as whole numbers of a scale each."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / levels
    codes: _Float64 = np.round(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0))
    rounded: _Float64 = codes * scale
    return rounded


def sale_estimates(q: ArrayLike, k: ArrayLike, *, scale: float | None = None, levels: float | None = 7.0) -> _Float64:
    """Estimated logits `[B, Hq, Lq, Lk]`; without levels nothing is rounded."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    mean_q, mean_k = q.mean(axis=2, keepdims=True), k.mean(axis=2, keepdims=True)
    rest_q, rest_k = q - mean_q, k - mean_k
    if levels is not None:
        rounded = _rounded(rest_q, levels) @ _rounded(rest_k, levels).swapaxes(-1, -2)
    else:
        rounded = rest_q @ rest_k.swapaxes(-1, -2)
    logits: _Float64 = rounded + mean_q @ rest_k.swapaxes(-1, -2) + q @ mean_k.swapaxes(-1, -2)
    return logits * (q.shape[-1] ** -0.5 if scale is None else scale)


def sale_kept(
    q: ArrayLike,
    k: ArrayLike,
    *,
    tau: ArrayLike = 0.004,
    block_q: int = 64,
    block_k: int = 32,
    local_window: int = 128,
    segment: int = 256,
    min_length: int = 1024,
    scale: float | None = None,
    levels: float | None = 7.0,
) -> NDArray[np.bool_]:
    """What is kept as booleans `[B, Hq, Lq, Lk]`, whole blocks; without levels nothing is rounded."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    tau = np.broadcast_to(np.asarray(tau, np.float64), heads)
    position = np.arange(rows) + keys - rows
    start = position // block_q * block_q  # of the query's block
    start = np.maximum(start, keys - rows)
    last = np.minimum(position // block_q * block_q + block_q, keys)
    limit = -(-last // block_k) * block_k
    j = np.arange(keys)
    judged_end = block_k + np.maximum(start - local_window - block_k, 0) // segment * segment
    judged = (j >= block_k) & (j < np.minimum(judged_end, limit)[:, None])
    near = (j < limit[:, None]) & ~judged
    if rows <= min_length:
        return np.broadcast_to(j < limit[:, None], (batch, heads, rows, keys))
    _, lse = attention(q, k, k, mask=near, causal=True, scale=scale, return_lse=True)
    estimates = sale_estimates(q, k, scale=scale, levels=levels)
    with np.errstate(divide="ignore"):
        margin = np.where(tau < 1e-5, -np.inf, np.log(tau))
    reaches = judged & (estimates >= lse[..., None] + margin[:, None, None])
    kept = np.zeros((batch, heads, rows, keys), bool)
    for first in np.unique(start):
        of_block = start == first
        for j0 in range(0, keys, block_k):
            part = np.s_[:, :, of_block, j0 : j0 + block_k]
            kept[part] = reaches[part].any(axis=(2, 3))[:, :, None, None]
    every: NDArray[np.bool_] = (kept & judged) | near
    return every


def sale_select(
    q: ArrayLike,
    k: ArrayLike,
    *,
    tau: ArrayLike = 0.004,
    block_q: int = 64,
    block_k: int = 32,
    local_window: int = 128,
    segment: int = 256,
    min_length: int = 1024,
    scale: float | None = None,
) -> NDArray[np.bool_]:
    """See `longattn.sparse.sale_select`; what is kept as booleans `[B, Hq, Lq, Lk]`, whole blocks."""
    sizes = {"block_q": block_q, "block_k": block_k, "local_window": local_window, "segment": segment}
    return sale_kept(q, k, tau=tau, min_length=min_length, scale=scale, **sizes)
