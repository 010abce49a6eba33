"""SnapKV from its rule."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.dense.attention import attention
from longattn.reference.kv.evicting import Float64, Policy, causal_mass, of_group


class SnapKV(Policy):
    """See `longattn.kv.evict.SnapKV`."""

    def __init__(
        self, budget: int, *, window: int = 32, kernel: int = 5, pooling: str = "avg", reduce: str = "mean"
    ) -> None:
        self.budget, self.window, self.kernel, self.pooling, self.reduce = budget, window, kernel, pooling, reduce

    def prompt(self, q: Float64, k: Float64, v: Float64, **options: Any) -> tuple[Float64, list[set[int]]]:
        """Full attention; the last rows vote."""
        length = k.shape[1]
        out = attention(q, k, v, causal=True, **options)
        if length <= self.budget:
            return out, [set(range(length)) for _ in k]
        earlier = length - self.window
        votes = causal_mass(q, k, range(earlier, length), **options)[:, :earlier]
        pooled = np.zeros_like(votes)
        for j in range(earlier):
            near = [votes[:, i] for i in range(j - self.kernel // 2, j + self.kernel // 2 + 1) if 0 <= i < earlier]
            pooled[:, j] = np.sum(near, axis=0) / self.kernel if self.pooling == "avg" else np.max(near, axis=0)
        of_head = of_group(pooled, len(k), self.reduce)
        best = [np.argsort(-scores, kind="stable")[: self.budget - self.window] for scores in of_head]
        return out, [set(rows.tolist()) | set(range(earlier, length)) for rows in best]
