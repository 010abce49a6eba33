"""RazorAttention from its rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.kv.evicting import Float64, Policy


class RazorAttention(Policy):
    """See `longattn.kv.evict.RazorAttention`; the compensation row is `residual="mean"` of the decode."""

    def __init__(
        self,
        retrieval_heads: ArrayLike,
        *,
        sinks: int = 4,
        window: int = 4000,
        ratio: int = 5,
        compensation: bool = True,
    ) -> None:
        self.retrieval_heads = np.asarray(retrieval_heads)
        self.sinks, self.window, self.ratio = sinks, window, ratio

    def prompt(self, q: Float64, k: Float64, v: Float64, **options: Any) -> tuple[Float64, list[set[int]]]:
        """Full attention."""
        return super().prompt(q, k, v, **options)

    def drop(self, step: int, alive: list[set[int]]) -> list[set[int]]:
        """What the next row does not see, in heads that are no retrieval heads."""
        last = max(self.window, math.ceil((step + 2) / self.ratio))
        return [
            set() if full else {j for j in rows if j >= self.sinks and j < step + 2 - last}
            for full, rows in zip(self.retrieval_heads, alive, strict=True)
        ]


def compensated(q: ArrayLike, k: ArrayLike, v: ArrayLike, keep: ArrayLike, scale: float | None = None) -> Float64:
    """One query row per head `[H, D]` over the kept rows `[H, L]` and as many copies of the mean pair as went."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    kept = np.broadcast_to(np.asarray(keep), k.shape[:2])
    out = np.zeros((len(q), v.shape[2]))
    for h, rows in enumerate(kept):
        gone = int((~rows).sum())
        keys, values = k[h, rows], v[h, rows]
        if gone:
            keys = np.concatenate([keys, np.repeat(k[h, ~rows].mean(axis=0, keepdims=True), gone, axis=0)])
            values = np.concatenate([values, np.repeat(v[h, ~rows].mean(axis=0, keepdims=True), gone, axis=0)])
        s = (q.shape[1] ** -0.5 if scale is None else scale) * keys @ q[h]
        e = np.exp(s - s.max())
        out[h] = e @ values / e.sum()
    return out
