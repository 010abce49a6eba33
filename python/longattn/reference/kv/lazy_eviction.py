"""LazyEviction from its rule."""

from __future__ import annotations

import math
from typing import Any

from longattn.reference.kv.evicting import Float64, Policy, lowest


class LazyEviction(Policy):
    """See `longattn.kv.evict.LazyEviction`."""

    def __init__(
        self,
        budget: float,
        *,
        window: int = 25,
        alpha: float = 1e-4,
        h2_weight: float = 1.0,
        reduce: str = "max",
        protect_prompt: bool = False,
    ) -> None:
        self.budget, self.window, self.alpha, self.h2_weight = budget, window, alpha, h2_weight
        self.reduce, self.protect_prompt = reduce, protect_prompt
        self.prompt_rows = 0
        #: Last active step and longest gap, by head and row.
        self.known: dict[tuple[int, int], tuple[int, int]] = {}

    def prompt(self, q: Float64, k: Float64, v: Float64, **options: Any) -> tuple[Float64, list[set[int]]]:
        """The prompt enters whole."""
        self.prompt_rows = k.shape[1]
        return super().prompt(q, k, v, **options)

    def observe(self, step: int, weights: list[dict[int, Float64]], logits: dict[int, Float64]) -> None:
        """Gaps between active steps."""
        for h, of_head in enumerate(weights):
            for row, w in of_head.items():
                last, gap = self.known.get((h, row), (row, 0))
                if getattr(w, self.reduce)() > self.alpha:
                    self.known[h, row] = step, max(gap, step - last)

    def score(self, step: int, head: int, row: int) -> float:
        """How much a row is worth at a step."""
        last, gap = self.known.get((head, row), (row, 0))
        if gap == 0:
            return 0.0

        def sigmoid(x: float) -> float:
            return 1 / (1 + math.exp(-x))

        return 2 * sigmoid(-(step - last) / gap) + self.h2_weight * 2 * sigmoid(-1 / gap)

    def drop(self, step: int, alive: list[set[int]]) -> list[set[int]]:
        """Every so many steps the lowest scores."""
        if step % self.window:
            return [set() for _ in alive]
        budget = self.budget if self.budget >= 1 else max(math.ceil(self.budget * (step + 1)), self.window)
        gone = []
        for h, rows in enumerate(alive):
            first = self.prompt_rows if self.protect_prompt else 0
            older = {row: self.score(step, h, row) for row in rows if first <= row <= step - self.window}
            gone.append(lowest(older, len(rows) - int(budget)))
        return gone
