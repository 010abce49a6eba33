"""Attention over a ring of workers from its formula: online softmax over shards, masks by position, float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def positions(length: int, workers: int, layout: str) -> list[NDArray[np.int64]]:
    """Positions of each worker's rows."""
    every = np.arange(length)
    if layout == "striped":
        return [every[worker::workers] for worker in range(workers)]
    if layout == "contiguous":
        return [every[length * w // workers : length * (w + 1) // workers] for w in range(workers)]
    ends = [length * n // (2 * workers) for n in range(2 * workers + 1)]
    chunks = [every[a:b] for a, b in pairwise(ends)]
    return [np.concatenate([chunks[w], chunks[2 * workers - 1 - w]]) for w in range(workers)]


def burst_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    workers: int = 4,
    layout: str = "zigzag",
    causal: bool = False,
    scale: float | None = None,
    nodes: int = 1,
    return_lse: bool = False,
) -> Any:
    """Each worker's queries over one shard of keys after another; see `longattn.distributed`.

    `nodes` says who sends to whom, which changes nothing here.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads, length, dim = q.shape[-3:]
    k, v = (np.repeat(x, heads // x.shape[-3], axis=-3) for x in (k, v))
    factor = dim**-0.5 if scale is None else scale
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.full(q.shape[:-1], -np.inf)
    shards = positions(length, workers, layout)
    for worker, mine in enumerate(shards):
        own = q[..., mine, :]
        top = np.full(own.shape[:-1], -np.inf)
        total, summed = np.zeros(own.shape[:-1]), np.zeros((*own.shape[:-1], v.shape[-1]))
        for n in range(workers):
            there = shards[(worker - n) % workers]
            if not len(there):
                continue
            s = factor * (own @ k[..., there, :].swapaxes(-1, -2))
            if causal:
                s = np.where(there <= mine[:, None], s, -np.inf)
            higher = np.maximum(top, s.max(axis=-1))
            shift = np.where(higher == -np.inf, 0.0, higher)
            p, old = np.exp(s - shift[..., None]), np.exp(top - shift)
            total, summed = old * total + p.sum(axis=-1), old[..., None] * summed + p @ v[..., there, :]
            top = higher
        out[..., mine, :] = summed / np.where(total == 0, 1, total)[..., None]
        with np.errstate(divide="ignore"):
            lse[..., mine] = np.where(total == 0, -np.inf, top + np.log(total))
    return (out, lse) if return_lse else out
