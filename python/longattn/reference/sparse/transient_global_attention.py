"""Local and transient global attention from its formula: float64 numpy with materialised scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def t5_bucket(distance: int, buckets: int, max_distance: int) -> int:
    """Bucket of `key position - query position`: half of the buckets for keys after the query."""
    half = buckets // 2
    bucket = half if distance > 0 else 0
    near = half // 2
    d = abs(distance)
    if d < near:
        return bucket + d
    far = near + int(math.log(d / near) / math.log(max_distance / near) * (half - near) + 1e-9)
    return bucket + min(far, half - 1)


def local_global_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    kg: ArrayLike,
    vg: ArrayLike,
    *,
    radius: int = 127,
    block: int = 16,
    local_bias: ArrayLike | None = None,
    side_bias: ArrayLike | None = None,
    scale: float = 1.0,
    return_lse: bool = False,
) -> Any:
    """Window and summaries in one softmax; see `longattn.sparse`."""
    q, k, v, kg, vg = (np.asarray(x, np.float64) for x in (q, k, v, kg, vg))
    heads, length = q.shape[-3:-1]
    share, count = heads // k.shape[-3], kg.shape[-2]
    k, v, kg, vg = (np.repeat(x, share, axis=-3) for x in (k, v, kg, vg))
    distance = np.arange(length) - np.arange(length)[:, None]
    own = np.minimum(np.arange(length) // block, count - 1)
    local, side = (
        np.zeros((heads, 1)) if table is None else np.asarray(table, np.float64) for table in (local_bias, side_bias)
    )

    def biased(s: Float64, table: Float64, offset: NDArray[np.int64]) -> Float64:
        middle = table.shape[1] // 2
        return s + table[:, np.clip(offset + middle, 0, table.shape[1] - 1)]

    near = biased(scale * (q @ k.swapaxes(-1, -2)), local, distance)
    near = np.where(np.abs(distance) <= radius, near, -np.inf)
    far = biased(scale * (q @ kg.swapaxes(-1, -2)), side, np.arange(count) - own[:, None])
    s = np.concatenate([near, far], axis=-1)
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - top)
    total = p.sum(axis=-1, keepdims=True)
    out = p @ np.concatenate([v, vg], axis=-2) / total
    return (out, (top + np.log(total))[..., 0]) if return_lse else out


def transient_global_attention(
    x: ArrayLike,
    wq: ArrayLike,
    wk: ArrayLike,
    wv: ArrayLike,
    g_weight: ArrayLike,
    *,
    heads: int,
    wo: ArrayLike | None = None,
    local_table: ArrayLike | None = None,
    side_table: ArrayLike | None = None,
    radius: int = 127,
    block: int = 16,
    max_distance: int = 128,
    eps: float = 1e-6,
    lengths: ArrayLike | None = None,
) -> Float64:
    """The layer, one sequence after another; see `longattn.sparse`."""
    x, wq, wk, wv, g_weight = (np.asarray(a, np.float64) for a in (x, wq, wk, wv, g_weight))
    batch, length, _ = x.shape
    dim = wq.shape[1] // heads
    kv_heads = wk.shape[1] // dim
    value_dim = wv.shape[1] // kv_heads
    width = heads * value_dim
    flat = np.zeros((batch, length, width))
    for b in range(batch):
        n = length if lengths is None else int(np.asarray(lengths)[b])
        rows, count = x[b, :n], n // block
        if n == 0:
            continue
        summed = np.zeros((count, x.shape[2]))
        for j in range(n if count else 0):
            summed[min(j // block, count - 1)] += rows[j]
        summary = summed / np.sqrt((summed**2).mean(axis=-1, keepdims=True) + eps) * g_weight

        def split(a: Float64, parts: int) -> Float64:
            return a.reshape(len(a), parts, a.shape[1] // parts).swapaxes(0, 1)

        def spread(table: ArrayLike | None) -> Float64 | None:
            if table is None:
                return None
            by_bucket = np.asarray(table, np.float64)
            reach = range(-max_distance, max_distance + 1)
            return np.stack([by_bucket[t5_bucket(d, len(by_bucket), max_distance)] for d in reach], axis=1)

        out = local_global_attention(
            split(rows @ wq, heads), split(rows @ wk, kv_heads), split(rows @ wv, kv_heads),
            split(summary @ wk, kv_heads), split(summary @ wv, kv_heads),
            radius=radius, block=block, local_bias=spread(local_table), side_bias=spread(side_table),
        )  # fmt: skip
        flat[b, :n] = out.swapaxes(0, 1).reshape(n, width)
    return flat if wo is None else flat @ np.asarray(wo, np.float64)
