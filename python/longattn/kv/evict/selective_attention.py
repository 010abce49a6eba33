"""The budget of selective attention: rows that later tokens are told to ignore go."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import integer
from longattn.dense.selective_attention import max_f_kept, selective_attention
from longattn.kv.evict.policy import Mask, Policy, weakest
from longattn.methods import Method
from longattn.reference import kv as reference


class SelectiveBudget(Policy):
    """Selective attention over at most `budget` rows: after each step those of largest `F` go.

    `F_j` is the sum of the positive logits that one query head gave key `j` in the steps before; every head's logits
    are lowered by it (`longattn.dense.selective_attention`). Since `F` only grows, a row that goes would not have been
    wanted again. All KV heads keep the same rows. The first `protect_first` rows and the newest never go; of equal
    rows the older goes first. A prompt is attended to whole, then cut to the budget by its `F`; rows that came one
    at a time from the start may leave others, as each was dropped by the `F` of its time.

    Args:
        budget: rows kept after each step, more than `protect_first`.
        selector_head: the query head whose logits select.
        protect_first: so many first rows are never selected.

    Raises:
        TypeError: a number is no integer.
        ValueError: a budget that cannot be met, or sinks in the cache, which this attention does not take.

    References:
        Y. Leviathan, M. Kalman, Y. Matias, "Selective Attention Improves Transformer", 2024, arXiv:2410.02703.
    """

    observes = "logits"
    single = True

    def __init__(self, budget: int, *, selector_head: int = 0, protect_first: int = 1) -> None:
        self.protect_first = integer(protect_first, "protect_first", 0)
        self.budget = integer(budget, "budget", self.protect_first + 1)
        self.selector_head = integer(selector_head, "selector_head", 0)
        self.logits_of = self.selector_head
        self._prompt: NDArray[np.float32] | None = None

    def capacity(self, prompt: int) -> int:
        """`budget` and the row of the step."""
        return self.budget + 1

    def prefill(self, q: Array, k: Array, v: Array, options: dict[str, Any], **info: Any) -> tuple[Array, Mask | None]:
        """Selective attention over the prompt, and the rows of smallest `F`."""
        return self._attended(q, k, v, options)

    def judge(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], options: dict[str, Any], **info: Any
    ) -> Mask | None:
        """The rows of smallest `F`, by the queries that are known."""
        before = np.zeros(k.shape[1] - q.shape[1], np.float32)
        return self._attended(q, k, v, options | {"state": before})[1]

    def _attended(self, q: Array, k: Array, v: Array, options: dict[str, Any]) -> tuple[Array, Mask]:
        if "sinks" in options:
            raise ValueError("sinks: got sink logits, expected none with selective attention")
        out, f = selective_attention(
            q, k, v, selector_head=self.selector_head, protect_first=self.protect_first, return_state=True, **options
        )
        selected = as_numpy(f, "state")
        self._prompt = np.where(np.isnan(selected), np.float32(0), selected)
        keep = np.zeros(k.shape[:2], bool)
        keep[:, max_f_kept(self._prompt, self.budget, protect_first=self.protect_first)] = True
        return out, keep

    def start(self, kv_heads: int, slots: int) -> None:
        """Nothing is selected."""
        super().start(kv_heads, slots)
        #: The same for every head.
        self.selected = np.zeros(slots, np.float32)

    def admit(self, slots: NDArray[np.int64], first: int, **info: Any) -> None:
        """New rows are not selected, those of a prompt as far as it says."""
        super().admit(slots, first)
        at = slots[0][slots[0] >= 0]
        self.selected[at] = 0.0 if self._prompt is None else self._prompt[slots[0] >= 0]
        self._prompt = None

    def bias(self) -> NDArray[np.float32] | None:
        """What logits are lowered by."""
        return np.broadcast_to(-self.selected, self.positions.shape)

    def observe(self, seen: NDArray[np.float32], step: int) -> None:
        """Adds what the row selects of the rows before it."""
        position = self.positions[0]
        theirs = (position >= self.protect_first) & (position < step)
        self.selected += np.where(theirs, np.maximum(seen, 0), 0)

    def choose(self, step: int) -> Mask | None:
        """The largest `F` beyond the budget."""
        live = self.live
        candidates = live & (self.positions >= self.protect_first) & (self.positions < step)
        scores = np.broadcast_to(-self.selected, live.shape)
        return weakest(scores, candidates, live.sum(axis=1) - self.budget, self.positions)


METHOD = Method(
    name="selective_attention_budget",
    family="kv",
    title="Selective Attention Improves Transformer",
    year=2024,
    arxiv="2410.02703",
    function=SelectiveBudget,
    reference=reference.SelectiveBudget,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A budget of the whole text gives selective attention, in steps as in the prompt.",
        "The kept rows are those of a plain simulation at every step.",
        "The protected rows and the newest are always there.",
    ),
    tests="tests/kv/test_selective_budget.py",
    cost="A step reads `budget + 1` rows; 4 bytes per slot.",
)
