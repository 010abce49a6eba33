"""AnchorAttention from its formulas: float64 numpy with materialised scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention


def anchor_margins(
    q: ArrayLike, k: ArrayLike, *, block: int = 128, step: int = 16, init_blocks: int = 1, scale: float | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """The anchor's mask `[Lq, Lk]`, and how far each candidate lies above the anchor `[B, Hq, groups, Lk]`.

    The second is the largest over the group's blocks; -inf for keys that are no candidates.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, heads, rows, dim = q.shape
    keys, group_rows = k.shape[2], block * step
    k = np.repeat(k, heads // k.shape[1], axis=1)
    s = (dim**-0.5 if scale is None else scale) * q @ k.swapaxes(-1, -2)
    position = np.arange(rows) + keys - rows
    start = np.clip(np.arange(rows) // group_rows * group_rows + keys - rows, 0, keys)
    j = np.arange(keys)
    initial = j < np.minimum(start, init_blocks * block)[:, None]
    anchor = (j <= position[:, None]) & (initial | (j >= start[:, None]))
    with np.errstate(invalid="ignore"):
        largest = np.where(anchor, s, -np.inf).max(axis=-1, initial=-np.inf)
    groups = -(-rows // group_rows)
    margins = np.full((batch, heads, groups, keys), -np.inf)
    for first in range(0, rows, block):
        part = slice(first, min(first + block, rows))
        g = first // group_rows
        pooled = np.einsum("bhd,bhkd->bhk", q[:, :, part].mean(axis=2), k) * (dim**-0.5 if scale is None else scale)
        with np.errstate(invalid="ignore"):
            margin = pooled - largest[:, :, part].mean(axis=2)[..., None]
        candidate = (j >= min(start[first], init_blocks * block)) & (j < start[first])
        margins[:, :, g] = np.maximum(margins[:, :, g], np.where(candidate, margin, -np.inf))
    return anchor, margins


def anchor_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    block: int = 128,
    step: int = 16,
    theta: float = 12.0,
    init_blocks: int = 1,
    group_reduce: str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.anchor_attention`."""
    q, k = np.asarray(q), np.asarray(k)
    heads, kv_heads = q.shape[1], k.shape[1]
    anchor, margins = anchor_margins(q, k, block=block, step=step, init_blocks=init_blocks, scale=scale)
    chosen = (margins + theta >= 0) & (margins > -np.inf)
    if group_reduce == "any":
        shared = chosen.reshape(q.shape[0], kv_heads, heads // kv_heads, *chosen.shape[2:]).any(axis=2)
        chosen = np.repeat(shared, heads // kv_heads, axis=1)
    mask = anchor | np.repeat(chosen, block * step, axis=2)[:, :, : q.shape[2]]
    return attention(q, k, v, mask=mask, scale=scale, return_lse=return_lse)
