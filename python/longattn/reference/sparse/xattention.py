"""XAttention from its formulas: float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention
from longattn.reference.sparse.choosing import fewest, over_tokens, softmax, spans


def _padded(x: NDArray[np.float64], stride: int) -> NDArray[np.float64]:
    return np.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % stride), (0, 0)))


def xattention_mass(
    q: ArrayLike, k: ArrayLike, *, stride: int = 8, block: int = 128, causal: bool = False, scale: float | None = None
) -> NDArray[np.float64]:
    """Sums of the antidiagonal weights over blocks, `[B, Hq, blocks, key blocks]`."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    k = np.repeat(k, heads // k.shape[1], axis=1)
    dots = (dim**-0.5 if scale is None else scale) * _padded(q, stride) @ _padded(k, stride).swapaxes(-1, -2)
    cut = dots.reshape(batch, heads, -(-rows // stride), stride, -(-keys // stride), stride)
    logits = np.asarray(sum(cut[:, :, :, stride - 1 - t, :, t] for t in range(stride))) / stride
    for i in range(logits.shape[2]):
        if causal:
            last = min((i + 1) * stride, rows) - 1 + keys - rows
            logits[:, :, i, max(0, last // stride + 1) :] = -np.inf
    weights = softmax(logits)
    step = block // stride
    out = [[weights[:, :, a, b].sum(axis=(2, 3)) for b in spans(weights.shape[3], step)]
           for a in spans(weights.shape[2], step)]  # fmt: skip
    return np.array(out).reshape(-(-rows // block), -(-keys // block), batch, heads).transpose(2, 3, 0, 1)


def xattention_blocks(
    q: ArrayLike,
    k: ArrayLike,
    *,
    threshold: ArrayLike = 0.9,
    stride: int = 8,
    block: int = 128,
    sink: bool = True,
    own: bool = True,
    causal: bool = False,
    scale: float | None = None,
) -> NDArray[np.bool_]:
    """Which key blocks each query block takes, `[B, Hq, blocks, key blocks]`."""
    rows, keys, heads = np.shape(q)[2], np.shape(k)[2], np.shape(q)[1]
    mass = xattention_mass(q, k, stride=stride, block=block, causal=causal, scale=scale)
    share = np.broadcast_to(np.asarray(threshold, np.float64), heads)
    kept = np.zeros(mass.shape, bool)
    for b, h, i in np.ndindex(*mass.shape[:3]):
        first, last = i * block + keys - rows, min((i + 1) * block, rows) + keys - rows
        limit = max(0, -(-last // block)) if causal else mass.shape[3]
        number = np.arange(min(limit, mass.shape[3]))
        here = (number * block < last) & ((number + 1) * block > first) & own
        kept[b, h, i, : len(number)] = fewest(
            mass[b, h, i, : len(number)], share[h], here | ((number == 0) & sink), least=1
        )
    return kept


def xattention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    block: int = 128,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    **choice: Any,
) -> Any:
    """See `longattn.sparse.xattention`."""
    blocks = xattention_blocks(q, k, block=block, causal=causal, scale=scale, **choice)
    mask = over_tokens(blocks, np.shape(q)[2], np.shape(k)[2], block, block)
    return attention(q, k, v, mask=mask, causal=causal, scale=scale, return_lse=return_lse)
