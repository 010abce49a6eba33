"""StreamingLLM from its mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.dense.attention import attention
from longattn.reference.kv.evicting import Float64, Policy


class StreamingLLM(Policy):
    """See `longattn.kv.evict.StreamingLLM`."""

    def __init__(self, sinks: int = 4, window: int = 1020) -> None:
        self.sinks, self.window = sinks, window

    def prompt(self, q: Float64, k: Float64, v: Float64, **options: Any) -> tuple[Float64, list[set[int]]]:
        """Attention with the mask."""
        i, j = np.indices((q.shape[1], k.shape[1]))
        out = attention(q, k, v, causal=True, mask=(j < self.sinks) | (i - j < self.window), **options)
        return out, [set(range(k.shape[1])) for _ in k]

    def drop(self, step: int, alive: list[set[int]]) -> list[set[int]]:
        """What the next row does not see."""
        return [{j for j in rows if j >= self.sinks and step + 1 - j >= self.window} for rows in alive]
