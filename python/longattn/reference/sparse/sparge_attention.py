"""SpargeAttention from its formulas: float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention


def _blocks(length: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def _likeness(rows: NDArray[np.float64]) -> float:
    """Mean cosine of all pairs of rows."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return float((unit @ unit.T).mean())


def sparge_scores(
    q: ArrayLike,
    k: ArrayLike,
    *,
    smooth_k: bool = True,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Scores of means `[B, Hq, blocks, key blocks]`, and the likeness of the rows of query and of key blocks."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    smooth: NDArray[np.float64] = k - k.mean(axis=2, keepdims=True) if smooth_k else k
    k = np.repeat(smooth, heads // smooth.shape[1], axis=1)
    of_q, of_k = _blocks(rows, block_q), _blocks(keys, block_k)
    mean_q = np.stack([q[:, :, part].mean(axis=2) for part in of_q], axis=2)
    mean_k = np.stack([k[:, :, part].mean(axis=2) for part in of_k], axis=2)
    scores = (dim**-0.5 if scale is None else scale) * mean_q @ mean_k.swapaxes(-1, -2)
    like = [
        np.array([[[_likeness(x[b, h, part]) for part in parts] for h in range(heads)] for b in range(batch)])
        for x, parts in ((q, of_q), (k, of_k))
    ]
    return scores, like[0], like[1]


def sparge_blocks(
    q: ArrayLike,
    k: ArrayLike,
    *,
    theta: ArrayLike = 0.6,
    cdf: ArrayLike = 0.98,
    topk: ArrayLike | None = None,
    smooth_k: bool = True,
    sink: bool = False,
    block_q: int = 128,
    block_k: int = 64,
    causal: bool = False,
    scale: float | None = None,
) -> NDArray[np.bool_]:
    """Which key blocks each query block takes, `[B, Hq, blocks, key blocks]`."""
    q, k = np.asarray(q), np.asarray(k)
    scores, like_q, like_k = sparge_scores(q, k, smooth_k=smooth_k, block_q=block_q, block_k=block_k, scale=scale)
    batch, heads, blocks, key_blocks = scores.shape
    rows, keys = q.shape[2], k.shape[2]
    theta, cdf = (np.broadcast_to(np.asarray(x, np.float64), heads) for x in (theta, cdf))
    counts = None if topk is None else np.broadcast_to(np.asarray(topk, np.float64), heads)
    kept = np.zeros(scores.shape, bool)
    for b, h, i in np.ndindex(batch, heads, blocks):
        last = min((i + 1) * block_q, rows) + keys - rows
        limit = max(0, -(-last // block_k)) if causal else key_blocks
        limit = min(limit, key_blocks)
        differ = like_k[b, h, :limit] <= theta[h]
        whole = like_q[b, h, i] <= theta[h] or theta[h] >= 1 or (counts is None and cdf[h] >= 1)
        kept[b, h, i, :limit] = differ | whole
        if sink and limit:
            kept[b, h, i, 0] = True
        alike = np.flatnonzero(~differ)
        if whole or not alike.size:
            continue
        s = scores[b, h, i, alike]
        p = np.exp(s - s.max())
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        if counts is None:
            n = max(1, int((np.cumsum(p[order]) <= cdf[h]).sum()))
        else:
            n = min(max(1, int(np.ceil(counts[h] * alike.size))), alike.size)
        kept[b, h, i, alike[order[:n]]] = True
    return kept


def sparge_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    theta: ArrayLike = 0.6,
    cdf: ArrayLike = 0.98,
    topk: ArrayLike | None = None,
    smooth_k: bool = True,
    sink: bool = False,
    block_q: int = 128,
    block_k: int = 64,
    skip_log2: float = 50.0,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.sparge_attention`; what the kernel skips is computed here."""
    del skip_log2
    q, k = np.asarray(q), np.asarray(k)
    blocks = sparge_blocks(
        q, k, theta=theta, cdf=cdf, topk=topk, smooth_k=smooth_k, sink=sink, block_q=block_q, block_k=block_k,
        causal=causal, scale=scale,
    )  # fmt: skip
    mask = np.repeat(np.repeat(blocks, block_q, axis=2), block_k, axis=3)[:, :, : q.shape[2], : k.shape[2]]
    return attention(q, k, v, mask=mask, causal=causal, scale=scale, return_lse=return_lse)
