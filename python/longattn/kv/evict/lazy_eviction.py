"""LazyEviction: rows whose attention tends to come back stay."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._checks import finite, flag, integer, one_of, real
from longattn.dense.attention_weights import attention_weights
from longattn.kv.evict.policy import Mask, Policy, over_group, weakest
from longattn.kv.slot_store import REDUCTIONS
from longattn.methods import Method
from longattn.reference import kv as reference


class LazyEviction(Policy):
    """Evicts every `window` steps, keeping the rows whose attention recurs and is not overdue.

    A row is active at step `t` where its weight, over the query heads of the group, exceeds `alpha`. With `TS` the
    last active step (at first its own) and `MRI` the largest gap between two active steps (at first 0), a row's score
    at step `t` is `2 sigma(-(t - TS) / MRI) + h2_weight * 2 sigma(-1 / MRI)`, and 0 where `MRI` is 0: what never came
    back goes first. At steps that are a multiple of `window`, with more than `budget` rows, the `window` last rows
    stay and the best `budget - window` of the others. In between up to `window` more rows are held.

    The step of a row is its position. A prompt enters whole, and its rows take part like others. The second term grows
    with `MRI`; summaries of the paper disagree on its sign, wherefore it has a factor.

    Args:
        budget: rows of each KV head that eviction leaves, at least `window`; below 1.0, a share of the text so far.
        window: steps from eviction to eviction, and last rows that stay.
        alpha: weight from which on a row counts as active.
        h2_weight: factor of the second term.
        reduce: how the weights of a group's query heads become one: "max", "mean" or "sum".
        protect_prompt: whether rows of the prompt never go (they count in the budget all the same).

    Raises:
        TypeError: an argument of another kind.
        ValueError: numbers that do not fit, or an unknown reduction.

    References:
        "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning", 2025,
        arXiv:2506.15969.
    """

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
        self.window = integer(window, "window", 1)
        if isinstance(budget, float) and not budget.is_integer():
            if not 0 < budget < 1:
                raise ValueError(f"budget: got {budget}, expected a number of rows or a share between 0 and 1")
            self.budget: float = budget
        else:
            self.budget = integer(int(budget) if isinstance(budget, float) else budget, "budget", self.window)
        self.alpha, self.h2_weight = finite(alpha, "alpha", 0), real(h2_weight, "h2_weight")
        if not math.isfinite(self.h2_weight):
            raise ValueError(f"h2_weight: got {h2_weight}, expected a finite number")
        one_of(reduce, "reduce", REDUCTIONS)
        self.observes = reduce
        self.protect_prompt = flag(protect_prompt, "protect_prompt")
        self._prompt = 0

    def capacity(self, prompt: int) -> int | None:
        """`budget + window`, or the prompt and a window (two, if protected); no limit with a share of the text."""
        if self.budget < 1:
            return None
        # Of a protected prompt an eviction leaves the last window beside it, before the next one comes.
        least = prompt + self.window if self.protect_prompt else prompt
        return max(int(self.budget), least) + self.window

    def judge(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], options: dict[str, Any], **info: Any
    ) -> Mask | None:
        """What is left of the prompt when the rows of the queries that are known were its last steps."""
        heads, length = k.shape[:2]
        self.start(heads, length)
        self.admit(np.broadcast_to(np.arange(length), (heads, length)), 0)
        first = length - q.shape[1]
        for row in range(q.shape[1]):
            weights = np.asarray(attention_weights(q, k, rows=[row], causal=True, **options))[:, 0]
            self.observe(over_group(weights, heads, str(self.observes)), first + row)
        gone = self.choose(-(-(length - 1) // self.window) * self.window)
        return None if gone is None else ~gone

    def start(self, kv_heads: int, slots: int) -> None:
        """No activity."""
        super().start(kv_heads, slots)
        self.last_active = np.zeros((kv_heads, slots), np.int32)
        self.longest_gap = np.zeros((kv_heads, slots), np.int32)

    def admit(self, slots: NDArray[np.int64], first: int, **info: Any) -> None:
        """A row is active when it comes."""
        super().admit(slots, first)
        self.put(self.last_active, slots, first + np.arange(slots.shape[1]))
        self.put(self.longest_gap, slots, 0)
        if first == 0 and slots.shape[1] > 1:
            self._prompt = slots.shape[1]

    def observe(self, seen: NDArray[np.float32], step: int) -> None:
        """Notes which rows are active."""
        active = seen > self.alpha
        gap = np.maximum(self.longest_gap, step - self.last_active)
        self.longest_gap = np.where(active, gap, self.longest_gap).astype(np.int32)
        self.last_active = np.where(active, step, self.last_active).astype(np.int32)

    def scores(self, step: int) -> NDArray[np.float64]:
        """Scores of the rows in all slots at a step, `[kv_heads, slots]`."""
        gap = self.longest_gap.astype(np.float64)
        came_back = gap > 0
        gap = np.where(came_back, gap, 1.0)
        overdue, rarely = 2 * _sigmoid(-(step - self.last_active) / gap), 2 * _sigmoid(-1 / gap)
        return np.where(came_back, overdue + self.h2_weight * rarely, 0.0)

    def choose(self, step: int) -> Mask | None:
        """Every `window` steps, the lowest scores beyond the budget."""
        if step % self.window:
            return None
        budget = self.budget if self.budget >= 1 else max(math.ceil(self.budget * (step + 1)), self.window)
        live = self.live
        candidates = live & (self.positions <= step - self.window)
        if self.protect_prompt:
            candidates &= self.positions >= self._prompt
        excess = np.minimum(live.sum(axis=1) - int(budget), candidates.sum(axis=1))
        return weakest(self.scores(step), candidates, excess, self.positions)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


METHOD = Method(
    name="lazy_eviction",
    family="kv",
    title="LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning",
    year=2025,
    arxiv="2506.15969",
    function=LazyEviction,
    reference=reference.LazyEviction,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A budget of the whole text never evicts and gives dense attention.",
        "A window of 1 holds exactly `budget` rows after every step.",
        "A row that is active at every step has a gap of 1 and a first term of 1.",
        "The last `window` rows are always there.",
        "The kept rows are those of a plain simulation at every step.",
    ),
    tests="tests/kv/test_lazy_eviction.py",
    cost="A step reads at most `budget + window` rows; 16 bytes per slot, and a sort of scores every `window` steps.",
)
