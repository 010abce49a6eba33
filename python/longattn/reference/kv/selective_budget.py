"""Selective attention with a budget, from its rule."""

from __future__ import annotations

from typing import Any

from longattn.reference.dense.selective_attention import selective_attention
from longattn.reference.kv.evicting import Float64, Policy, lowest


class SelectiveBudget(Policy):
    """See `longattn.kv.evict.SelectiveBudget`."""

    def __init__(self, budget: int, *, selector_head: int = 0, protect_first: int = 1) -> None:
        self.budget, self.selector_head, self.protect_first = budget, selector_head, protect_first
        self.selected: dict[int, float] = {}

    def prompt(self, q: Float64, k: Float64, v: Float64, **options: Any) -> tuple[Float64, list[set[int]]]:
        """Selective attention over all rows."""
        out, f = selective_attention(
            q, k, v, selector_head=self.selector_head, protect_first=self.protect_first, return_state=True, **options
        )
        self.selected = dict(enumerate(f.tolist()))
        return out, [set(range(k.shape[1])) for _ in k]

    def lowered(self, row: int) -> float:
        """What earlier rows selected."""
        return self.selected.get(row, 0.0)

    def observe(self, step: int, weights: list[dict[int, Float64]], logits: dict[int, Float64]) -> None:
        """What this row selects."""
        for row, of_heads in logits.items():
            if self.protect_first <= row < step:
                self.selected[row] = self.selected.get(row, 0.0) + max(of_heads[self.selector_head], 0.0)

    def drop(self, step: int, alive: list[set[int]]) -> list[set[int]]:
        """What is selected most."""
        scores = {row: -self.selected.get(row, 0.0) for row in alive[0] if self.protect_first <= row < step}
        gone = lowest(scores, len(alive[0]) - self.budget)
        return [gone for _ in alive]
