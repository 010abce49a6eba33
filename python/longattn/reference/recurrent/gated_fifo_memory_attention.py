"""Global attention, chunked attention and a gated FIFO memory from their formulas: one token after another, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def gated_fifo_memory_attention(
    x: ArrayLike,
    wq: ArrayLike,
    wk: ArrayLike,
    wv: ArrayLike,
    memory_weights: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike] | None = None,
    *,
    heads: int,
    wo: ArrayLike | None = None,
    slots: int = 16,
    memory: ArrayLike | None = None,
    chunk: int = 64,
    segment: int | None = None,
    previous_chunk: bool = False,
    use_global: bool = True,
    use_local: bool = True,
    pooling: str = "mean",
    combine: str = "sum",
    branch_logits: ArrayLike | None = None,
    rope_base: float | None = None,
    scale: float | None = None,
    return_memory: bool = False,
) -> Any:
    """Output `[B, L, heads * Dv]` (or times `wo`), with `return_memory` also the slots; see `longattn.recurrent`."""
    x, wq, wk, wv = (np.asarray(a, np.float64) for a in (x, wq, wk, wv))
    batch, length, width = x.shape
    dim = wq.shape[1] // heads
    kv_heads = wk.shape[1] // dim
    wide = wv.shape[1] // kv_heads
    factor = dim**-0.5 if scale is None else scale
    slot = np.zeros((batch, slots, width)) if memory is None else np.array(memory, np.float64)
    own = [use_global, use_local, slots > 0]
    logits = np.zeros((heads, 3)) if branch_logits is None else np.asarray(branch_logits, np.float64)
    logits = np.broadcast_to(logits, (heads, 3))
    size = chunk if segment is None else segment
    out = np.zeros((batch, length, heads, wide))

    def keys(rows: Float64, kv: int) -> Float64:
        found: Float64 = rows @ wk[:, kv * dim : (kv + 1) * dim]
        return found

    def values(rows: Float64, kv: int) -> Float64:
        found: Float64 = rows @ wv[:, kv * wide : (kv + 1) * wide]
        return found

    for b in range(batch):
        placed = [[rotated(row, j, rope_base) for j, row in enumerate(keys(x[b], kv))] for kv in range(kv_heads)]
        turned = [np.array(rows) for rows in placed]
        for i in range(length):
            if slots and i and i % size == 0:
                part = x[b, i - size : i]
                slot[b] = written(slot[b], part.mean(axis=0) if pooling == "mean" else part[-1], memory_weights)
            for h in range(heads):
                kv = h // (heads // kv_heads)
                query = x[b, i] @ wq[:, h * dim : (h + 1) * dim]

                start = max(i // chunk * chunk - (chunk if previous_chunk else 0), 0)
                branches = []
                for first in (0, start):
                    seen = slice(first, i + 1)
                    s = factor * (turned[kv][seen] @ rotated(query, i, rope_base))
                    branches.append(softmax(s) @ values(x[b, seen], kv))
                branches.append(
                    softmax(factor * (keys(slot[b], kv) @ query)) @ values(slot[b], kv) if slots else np.zeros(wide)
                )
                if combine == "sum":
                    shares = np.ones(3)
                elif combine == "sigmoid":
                    shares = 1 / (1 + np.exp(-logits[h]))
                else:
                    shares = softmax(np.where(own, logits[h], -np.inf))
                out[b, i, h] = sum(share * y for share, y, on in zip(shares, branches, own, strict=True) if on)
        if slots and length and length % size == 0:
            part = x[b, length - size :]
            slot[b] = written(slot[b], part.mean(axis=0) if pooling == "mean" else part[-1], memory_weights)
    flat = out.reshape(batch, length, heads * wide)
    result = flat if wo is None else flat @ np.asarray(wo, np.float64)
    return (result, slot) if return_memory else result


def written(slot: Float64, summary: Float64, weights: Any) -> Float64:
    """Slots after a segment with this summary."""
    wg, ug, bias, wu = (np.asarray(w, np.float64) for w in weights)
    gate = 1 / (1 + np.exp(-(summary @ wg + slot[0] @ ug + bias)))
    new: Float64 = gate * np.tanh(summary @ wu) + (1 - gate) * slot[0]
    return np.concatenate([slot[1:], new[None]])


def softmax(s: Float64) -> Float64:
    """Weights."""
    e: Float64 = np.exp(s - s.max())
    weights: Float64 = e / e.sum()
    return weights


def rotated(x: Float64, position: int, base: float | None) -> Float64:
    """A row turned by its position."""
    if base is None:
        return x
    half = len(x) // 2
    z: NDArray[np.complex128] = (x[:half] + 1j * x[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag])
