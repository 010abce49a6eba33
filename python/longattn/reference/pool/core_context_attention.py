"""Core context aware attention from its formula: one row after another, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def core_context_pool(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, group: int = 16, scale: float | None = None
) -> tuple[Float64, Float64]:
    """Core keys and values `[B, Hkv, L // group, D]`; see `longattn.pool`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if q.ndim == 3:
        core_k, core_v = core_context_pool(q[None], k[None], v[None], group=group, scale=scale)
        return core_k[0], core_v[0]
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    factor = dim**-0.5 if scale is None else scale
    core_k = np.zeros((batch, kv_heads, length // group, dim))
    core_v = np.zeros((batch, kv_heads, length // group, v.shape[-1]))
    for b in range(batch):
        for h in range(kv_heads):
            for n in range(length // group):
                rows = slice(n * group, (n + 1) * group)
                of_head = slice(h * heads // kv_heads, (h + 1) * heads // kv_heads)
                last = q[b, of_head, (n + 1) * group - 1].mean(axis=0)
                s = factor * (k[b, h, rows] @ last)
                a = np.exp(s - s.max())
                a /= a.sum()
                core_k[b, h, n], core_v[b, h, n] = a @ k[b, h, rows], a @ v[b, h, rows]
    return core_k, core_v


def core_context_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    group: int = 16,
    window: int = 1024,
    scale: float | None = None,
    count_bias: float = 0.0,
    cores: tuple[ArrayLike, ArrayLike] | None = None,
    return_lse: bool = False,
) -> Any:
    """Each query over the cores of distant groups and the tokens near it; see `longattn.pool`."""
    if np.ndim(q) == 3:
        given = None if cores is None else (np.asarray(cores[0])[None], np.asarray(cores[1])[None])
        pair = core_context_attention(
            np.asarray(q)[None], np.asarray(k)[None], np.asarray(v)[None], group=group, window=window, scale=scale,
            count_bias=count_bias, cores=given, return_lse=True,
        )  # fmt: skip
        return (pair[0][0], pair[1][0]) if return_lse else pair[0][0]
    core_k, core_v = core_context_pool(q, k, v, group=group, scale=scale) if cores is None else cores
    q, k, v, core_k, core_v = (np.asarray(x, np.float64) for x in (q, k, v, core_k, core_v))
    batch, heads, rows, dim = q.shape
    keys, share = k.shape[2], heads // k.shape[1]
    factor = dim**-0.5 if scale is None else scale
    out, lse = np.zeros((batch, heads, rows, v.shape[-1])), np.full((batch, heads, rows), -np.inf)
    for b in range(batch):
        for h in range(heads):
            kv = h // share
            for row in range(rows):
                i = keys - rows + row
                seen = [n for n in range(core_k.shape[2]) if n * group + group - 1 <= i - window]
                near = [j for j in range(keys) if i - window - (i + 1) % group < j <= i]
                s = np.concatenate(
                    [
                        factor * (core_k[b, kv, seen] @ q[b, h, row]) + count_bias,
                        factor * (k[b, kv, near] @ q[b, h, row]),
                    ]
                )
                if not s.size:
                    continue
                p = np.exp(s - s.max())
                out[b, h, row] = p @ np.concatenate([core_v[b, kv, seen], v[b, kv, near]]) / p.sum()
                lse[b, h, row] = s.max() + np.log(p.sum())
    return (out, lse) if return_lse else out
