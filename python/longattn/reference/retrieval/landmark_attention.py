"""Landmark attention from its formula: weights of one row after another, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def landmark_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    block_len: int = 50,
    top_k: int | None = None,
    select: str = "row",
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Two-level softmax over blocks closed by landmarks; see `longattn.retrieval`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if q.ndim == 3:
        weights, lse = landmark_weights(q, k, block_len=block_len, top_k=top_k, select=select, scale=scale)
        out = weights @ np.repeat(v, q.shape[0] // k.shape[0], axis=0)
    else:
        options = {"block_len": block_len, "top_k": top_k, "select": select, "scale": scale}
        pairs = [landmark_attention(*x, return_lse=True, **options) for x in zip(q, k, v, strict=True)]  # type: ignore[arg-type]
        out, lse = (np.stack(x) for x in zip(*pairs, strict=True))
    return (out, lse) if return_lse else out


def landmark_weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    block_len: int,
    top_k: int | None = None,
    select: str = "row",
    scale: float | None = None,
    rope_base: float | None = None,
) -> tuple[Float64, Float64]:
    """Weights `[Hq, Lq, Lk]` of one sequence, and lse of the upper level.

    With `rope_base` queries and keys come unrotated, and blocks are rotated to the slots that they get, as
    `longattn.retrieval.LandmarkCache` does.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    heads, rows, dim = q.shape
    keys, page, share = k.shape[1], block_len + 1, heads // k.shape[0]
    factor = dim**-0.5 if scale is None else scale
    weights, lse = np.zeros((heads, rows, keys)), np.full((heads, rows), -np.inf)

    def logit(h: int, row: int, j: int, position: int) -> float:
        """Of the key `j`, as if it were at `position`."""
        query, key = q[h, row], k[h // share, j]
        if rope_base is not None:
            query, key = rotated(query, keys - rows + row, rope_base), rotated(key, position, rope_base)
        return float(factor * (query @ key))

    def scores(h: int, row: int, c: int) -> Float64:
        """Landmark logits by which blocks are chosen: those older than the last `top_k` in slot 0."""
        oldest = 0 if top_k is None else max(c - top_k - 1, 0)
        places = [max(b, oldest) if top_k is None or b >= c - top_k else oldest for b in range(c)]
        return np.array([logit(h, row, b * page + block_len, places[b] * page + block_len) for b in range(c)])

    def best(ranking: Float64, c: int) -> list[int]:
        order = sorted(range(c), key=lambda b: (-ranking[b], b))
        return sorted(order[: c if top_k is None else top_k])

    for h in range(heads):
        for row in range(rows):
            i = keys - rows + row
            c = i // page
            if select == "row":
                chosen = best(scores(h, row, c), c)
            else:
                together = [r for r in range(rows) if (keys - rows + r) // page == c]
                shares = []
                for r in together if c else []:
                    s = scores(h, r, c)
                    e = np.exp(s - s.max())
                    shares.append(e / e.sum())
                chosen = best(np.max(shares, axis=0), c) if c else []
            slots = {}
            for rank, b in enumerate(chosen):
                if top_k is None or rope_base is None:
                    slots[b] = b
                else:
                    late = b >= c - top_k
                    slots[b] = c - top_k - 1 + rank + (top_k - len(chosen)) + late
            own = [j for j in range(c * page, i + 1) if j % page != block_len]
            top = [logit(h, row, j, j) for j in own]
            top += [logit(h, row, b * page + block_len, slots[b] * page + block_len) for b in chosen]
            if not top:
                continue
            lse[h, row] = log_sum(np.array(top))
            p = np.exp(np.array(top) - lse[h, row])
            weights[h, row, own] = p[: len(own)]
            for b, mass in zip(chosen, p[len(own) :], strict=True):
                inside = np.array([logit(h, row, b * page + o, slots[b] * page + o) for o in range(block_len)])
                weights[h, row, b * page : b * page + block_len] = mass * np.exp(inside - log_sum(inside))
    return weights, lse


def rotated(x: Float64, position: int, base: float) -> Float64:
    """A row turned by its position; dimension `d` goes with `d + D / 2`."""
    half = len(x) // 2
    angle = position * base ** (-np.arange(half) / half)
    first, second = x[:half], x[half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    )


def log_sum(s: Float64) -> float:
    """`ln(sum(exp(s)))`."""
    return float(s.max() + np.log(np.exp(s - s.max()).sum()))
