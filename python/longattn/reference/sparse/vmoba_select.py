"""VMoBA from its formulas: float64 numpy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention
from longattn.reference.sparse.choosing import fewest


def block_numbers(grid: tuple[int, int, int], partition: float | tuple[int, ...]) -> NDArray[np.int64]:
    """The block that each token is in."""
    t, y, x = (a.ravel() for a in np.mgrid[: grid[0], : grid[1], : grid[2]])
    if not isinstance(partition, tuple | list):
        return np.arange(len(t)) // int(partition * grid[1] * grid[2])
    bt, bh, bw = (grid[0], *partition) if len(partition) == 2 else partition
    numbers: NDArray[np.int64] = (t // bt * (grid[1] // bh) + y // bh) * (grid[2] // bw) + x // bw
    return numbers


def vmoba_taken(
    q: ArrayLike,
    k: ArrayLike,
    numbers: NDArray[np.int64],
    *,
    tau: float = 0.25,
    top_k: int | None = None,
    scope: str = "head",
    min_extra: int = 1,
) -> NDArray[np.bool_]:
    """The blocks that each query takes, `[B, Hq, L, blocks]`."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    count = numbers.max() + 1
    mean = np.stack([k[:, :, numbers == c].mean(axis=2) for c in range(count)], axis=2)
    gate = q @ np.repeat(mean, q.shape[1] // k.shape[1], axis=1).swapaxes(-1, -2)
    heads, rows = gate.shape[1:3]
    own = np.broadcast_to(numbers[:, None] == np.arange(count), gate.shape)
    # Scopes as rows.
    axes = {"query": (0, 1, 2, 3), "head": (0, 1, 2, 3), "all": (0, 1, 2, 3), "block": (0, 3, 1, 2)}[scope]
    width = {"query": count, "head": rows * count, "all": heads * rows * count, "block": heads * rows}[scope]
    turned = gate.transpose(axes)
    scores, forced = turned.reshape(-1, width), own.transpose(axes).reshape(-1, width)
    taken = np.zeros(scores.shape, bool)
    for i, row in enumerate(scores):
        if top_k is not None:
            most = top_k if scope == "query" else top_k * rows
            taken[i] = fewest(row, 0.0, forced[i], least=most, most=most)
            continue
        span = row.max() - row.min()
        weights = (row - row.min()) / (span if span > 1e-6 else 1.0)
        taken[i] = fewest(weights, tau, forced[i], least=int(forced[i].sum()) + min_extra)
    back = taken.reshape(turned.shape)
    return back.transpose(0, 2, 3, 1) if scope == "block" else back


def vmoba_select(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    grid: Any,
    partition: float | tuple[int, ...],
    cu_seqlens: ArrayLike | None = None,
    tau: float = 0.25,
    top_k: int | None = None,
    scope: str = "head",
    min_extra: int = 1,
    scale: float | None = None,
) -> NDArray[np.float64]:
    """See `longattn.sparse.vmoba_select`."""
    if cu_seqlens is not None:
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        whole = np.zeros((*q.shape[:-1], v.shape[-1]))
        rule: dict[str, Any] = {"tau": tau, "top_k": top_k, "scope": scope, "min_extra": min_extra, "scale": scale}
        for own, (first, last) in zip(grid, pairwise(np.asarray(cu_seqlens).tolist()), strict=True):
            if first < last:
                part = (x[..., first:last, :] for x in (q, k, v))
                whole[..., first:last, :] = vmoba_select(*part, grid=own, partition=partition, **rule)
        return whole
    numbers = block_numbers(grid, partition)
    taken = vmoba_taken(q, k, numbers, tau=tau, top_k=top_k, scope=scope, min_extra=min_extra)
    out: NDArray[np.float64] = attention(q, k, v, mask=taken[..., numbers], scale=scale)
    return out
