"""A-VL from its rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.dense.attention import attention
from longattn.reference.dense.attention_weights import attention_weights
from longattn.reference.kv.evicting import Float64, Policy, causal_mass, lowest, of_group


class AVLCache(Policy):
    """See `longattn.kv.evict.AVLCache`."""

    def __init__(
        self,
        *,
        core: float = 10.0,
        secondary: float = 50.0,
        text: float = 50.0,
        refresh: int = 8,
        text_budget: int | None = None,
    ) -> None:
        self.shares, self.text, self.refresh, self.text_budget = (core, secondary), text, refresh, text_budget
        self.visual: set[int] = set()
        self.core: set[int] = set()
        self.core_count = self.text_rows = self.steps = 0
        self.scores: list[dict[int, float]] = []

    def prompt(
        self, q: Float64, k: Float64, v: Float64, visual: ArrayLike | None = None, **options: Any
    ) -> tuple[Float64, list[set[int]]]:
        """Full attention; the last row says what the visual rows are worth."""
        length = k.shape[1]
        seen = np.flatnonzero(np.zeros(length, bool) if visual is None else np.asarray(visual))
        s = attention_weights(q, k, [length - 1], causal=True, **options)[:, 0].mean(axis=0)
        self.core_count, kept = (math.ceil(share * len(seen) / 100 - 1e-9) for share in self.shares)
        order = sorted(seen.tolist(), key=lambda row: (-s[row], row))
        self.visual, self.core = set(order[:kept]), set(order[: self.core_count])
        mass = of_group(causal_mass(q, k, **options), len(k), "mean")
        self.scores = [dict(enumerate(of_head.tolist())) for of_head in mass]
        self.text_rows = length - len(seen)
        stay = set(range(length)) - (set(seen.tolist()) - self.visual)
        return attention(q, k, v, causal=True, **options), [set(stay) for _ in k]

    def reads(self, step: int, head: int, alive: set[int]) -> set[int]:
        """Text and core, or everything."""
        self.steps += head == 0
        return alive if self.steps % self.refresh == 0 else alive - (self.visual - self.core)

    def observe(self, step: int, weights: list[dict[int, Float64]], logits: dict[int, Float64]) -> None:
        """Adds weights; picks the core anew where all was read."""
        self.text_rows += 1
        self.scores = self.scores or [{} for _ in weights]
        for scores, of_head in zip(self.scores, weights, strict=True):
            for row, w in of_head.items():
                scores[row] = scores.get(row, 0.0) + w.mean()
        if self.visual and self.steps % self.refresh == 0:
            s = {row: sum(of_head[row].mean() for of_head in weights) for row in self.visual}
            self.core = set(sorted(s, key=lambda row: (-s[row], row))[: self.core_count])

    def drop(self, step: int, alive: list[set[int]]) -> list[set[int]]:
        """Text beyond its budget."""
        budget = self.text_budget
        if budget is None:
            budget = math.ceil(self.text * self.text_rows / 100 - 1e-9)
        gone = []
        for scores, rows in zip(self.scores, alive, strict=True):
            text = sorted(rows - self.visual)
            older = text[: len(text) - max(budget // 2, 1)]
            gone.append(lowest({row: scores[row] for row in older}, len(text) - budget))
        return gone
