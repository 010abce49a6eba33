"""NSA from its formulas: float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention
from longattn.reference.sparse.choosing import fewest, softmax


def nsa_blocks(
    q: ArrayLike,
    compressed: ArrayLike,
    keys: int,
    *,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    n_select: int = 16,
    n_sink: int = 1,
    n_local: int = 2,
    scale: float | None = None,
) -> NDArray[np.bool_]:
    """The blocks that each query selects, `[B, Hkv, Lq, blocks]`."""
    q, k_c = np.asarray(q, np.float64), np.asarray(compressed, np.float64)
    batch, heads, rows, dim = q.shape
    kv_heads, count = k_c.shape[1:3]
    group, blocks = heads // kv_heads, -(-keys // select_block)
    positions = np.arange(rows) + keys - rows
    ends = np.arange(count) * stride + block - 1
    logits = (dim**-0.5 if scale is None else scale) * q @ np.repeat(k_c, group, axis=1).swapaxes(-1, -2)
    weights = softmax(np.where(ends <= positions[:, None], logits, -np.inf))
    shared = np.zeros((count, blocks))
    for i in range(count):
        for piece in range(i, i + block // stride):
            at = piece * stride // select_block
            if at < blocks:
                shared[i, at] += 1
    scores = (weights @ shared).reshape(batch, kv_heads, group, rows, blocks).sum(axis=2)
    kept = np.zeros(scores.shape, bool)
    for b, h, i in np.ndindex(batch, kv_heads, rows):
        own = positions[i] // select_block
        number = np.arange(max(0, own + 1))
        forced = (number < n_sink) | (number > own - n_local)
        kept[b, h, i, : len(number)] = fewest(
            scores[b, h, i, : len(number)], 0.0, forced, least=n_select, most=n_select
        )
    return kept


def native_sparse_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    gates: ArrayLike,
    *,
    compressed: tuple[ArrayLike, ArrayLike] | None = None,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    window: int = 512,
    scale: float | None = None,
    **choice: Any,
) -> NDArray[np.float64]:
    """See `longattn.sparse.native_sparse_attention`."""
    q, k, v, gates = (np.asarray(x, np.float64) for x in (q, k, v, gates))
    rows, keys = q.shape[2], k.shape[2]
    starts = range(0, keys - block + 1, stride)
    if compressed is None:
        k_c, v_c = (
            np.stack([x[:, :, s : s + block].mean(axis=2) for s in starts], axis=2) if starts else x[:, :, :0]
            for x in (k, v)
        )
    else:
        k_c, v_c = (np.asarray(x, np.float64) for x in compressed)
    positions = np.arange(rows)[:, None] + keys - rows
    ends = np.arange(k_c.shape[2]) * stride + block - 1
    blocks = nsa_blocks(q, k_c, keys, block=block, stride=stride, select_block=select_block, scale=scale, **choice)
    selected = np.repeat(blocks, select_block, axis=3)[..., :keys]
    selected = np.repeat(selected, q.shape[1] // k.shape[1], axis=1)
    parts = (
        attention(q, k_c, v_c, mask=(ends <= positions)[None, None], scale=scale),
        attention(q, k, v, mask=selected, causal=True, scale=scale),
        attention(q, k, v, causal=True, window=(window - 1, 0), scale=scale),
    )
    out: NDArray[np.float64] = np.sum([gates[..., i : i + 1] * part for i, part in enumerate(parts)], axis=0)
    return out
