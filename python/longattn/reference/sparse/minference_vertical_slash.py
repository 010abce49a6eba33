"""Vertical and slanted lines from their formulas: float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention


def best_of(scores: NDArray[np.float64], count: int, forced: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Forced entries of a row, and the best others up to `count` altogether; equal ones by number."""
    order = np.argsort(np.where(forced, -np.inf, -scores), kind="stable")
    taken = forced.copy()
    taken[order[:count]] = True
    return taken


def vertical_slash_mask(
    q: ArrayLike,
    k: ArrayLike,
    *,
    last_q: int = 64,
    vertical: int = 500,
    slash: int = 700,
    n_sink: int = 30,
    local: int = 100,
    block_q: int = 64,
    scale: float | None = None,
) -> NDArray[np.bool_]:
    """Which keys each query lists, `[B, Hq, Lq, Lk]`, before causality."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    k = np.repeat(k, heads // k.shape[1], axis=1)
    last = min(last_q, rows, keys)
    logits = (dim**-0.5 if scale is None else scale) * q[:, :, rows - last :] @ k.swapaxes(-1, -2)
    positions = np.arange(keys - last, keys)[:, None]
    distance = positions - np.arange(keys)
    logits = np.where(distance >= 0, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    kept = np.zeros((batch, heads, rows, keys), bool)
    every = np.arange(keys)
    for b, h in np.ndindex(batch, heads):
        w = weights[b, h]
        by_distance = np.array([w[distance == d].sum() for d in range(keys)])
        columns = best_of(w.sum(axis=0), vertical, every < n_sink)
        lines = best_of(by_distance, slash, every < local)
        for start in range(0, rows, block_q):
            block = np.arange(start, min(start + block_q, rows))
            back = block[:, None] + keys - rows - every
            on_line = ((back >= 0) & lines[np.clip(back, 0, keys - 1)]).any(axis=0)
            kept[b, h, block] = columns | on_line
    return kept


def minference_vertical_slash(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, scale: float | None = None, return_lse: bool = False, **lines: Any
) -> Any:
    """See `longattn.sparse.minference_vertical_slash`."""
    mask = vertical_slash_mask(q, k, scale=scale, **lines)
    return attention(q, k, v, mask=mask, causal=True, scale=scale, return_lse=return_lse)
