"""MInference's dynamic blocks from their formula: float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention
from longattn.reference.sparse.choosing import fewest, over_tokens, pooled


def dynamic_blocks(
    q: ArrayLike, k: ArrayLike, *, top_k: int = 100, block: int = 64, own: bool = True, causal: bool = False
) -> NDArray[np.bool_]:
    """Which key blocks each query block takes, `[B, Hq, blocks, key blocks]`."""
    rows, keys = np.shape(q)[2], np.shape(k)[2]
    scores = pooled(q, k, block, block, 1.0)
    kept = np.zeros(scores.shape, bool)
    for b, h, i in np.ndindex(*scores.shape[:3]):
        first, last = i * block + keys - rows, min((i + 1) * block, rows) + keys - rows
        number = np.arange(min(max(0, -(-last // block)), scores.shape[3]) if causal else scores.shape[3])
        here = (number * block < last) & ((number + 1) * block > first) & own
        kept[b, h, i, : len(number)] = fewest(scores[b, h, i, : len(number)], 0.0, here, least=top_k, most=top_k)
    return kept


def dynamic_block_topk(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    top_k: int = 100,
    block: int = 64,
    own: bool = True,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.dynamic_block_topk`."""
    blocks = dynamic_blocks(q, k, top_k=top_k, block=block, own=own, causal=causal)
    mask = over_tokens(blocks, np.shape(q)[2], np.shape(k)[2], block, block)
    return attention(q, k, v, mask=mask, causal=causal, scale=scale, return_lse=return_lse)
