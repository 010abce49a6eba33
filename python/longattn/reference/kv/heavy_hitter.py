"""H2O from its rule."""

from __future__ import annotations

from typing import Any

from longattn.reference.dense.attention import attention
from longattn.reference.kv.evicting import Float64, Policy, causal_mass, lowest, of_group


class HeavyHitter(Policy):
    """See `longattn.kv.evict.HeavyHitter`."""

    def __init__(self, heavy: int, recent: int) -> None:
        self.heavy, self.recent = heavy, recent
        self.scores: list[dict[int, float]] = []

    def prompt(self, q: Float64, k: Float64, v: Float64, **options: Any) -> tuple[Float64, list[set[int]]]:
        """Full attention, whose weights are the first scores."""
        mass = of_group(causal_mass(q, k, **options), len(k), "sum")
        self.scores = [dict(enumerate(of_head.tolist())) for of_head in mass]
        return attention(q, k, v, causal=True, **options), [set(range(k.shape[1])) for _ in k]

    def observe(self, step: int, weights: list[dict[int, Float64]], logits: dict[int, Float64]) -> None:
        """Adds weights."""
        self.scores = self.scores or [{} for _ in weights]
        for scores, of_head in zip(self.scores, weights, strict=True):
            for row, w in of_head.items():
                scores[row] = scores.get(row, 0.0) + w.sum()

    def drop(self, step: int, alive: list[set[int]]) -> list[set[int]]:
        """The lowest scores but for the last rows."""
        gone = []
        for scores, rows in zip(self.scores, alive, strict=True):
            older = {row: scores[row] for row in rows if row <= step - self.recent}
            gone.append(lowest(older, len(rows) - self.heavy - self.recent))
        return gone
