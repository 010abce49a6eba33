"""H2O: the rows that received the most attention so far, and the last ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import integer
from longattn.dense.prob_reduce import prob_reduce
from longattn.kv.evict.policy import Mask, Policy, best, over_group, weakest
from longattn.methods import Method
from longattn.reference import kv as reference


class HeavyHitter(Policy):
    """Keeps the `recent` last rows of each KV head and the `heavy` others with the largest accumulated weight.

    Every query adds the softmax weights of the rows it saw to their scores, summed over the query heads of the group
    and over the steps (of a prompt: over all of its rows, which see each other in full). After each step the rows of
    lowest score go until `heavy + recent` are left; of equal scores the older goes first.

    Args:
        heavy: rows kept for their scores.
        recent: last rows kept whatever their score.

    Raises:
        TypeError: a number is no integer.
        ValueError: `recent` below 1 or `heavy` below 0.

    References:
        Z. Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", 2023,
        arXiv:2306.14048.
    """

    observes = "sum"

    def __init__(self, heavy: int, recent: int) -> None:
        self.heavy = integer(heavy, "heavy", 0)
        self.recent = integer(recent, "recent", 1)
        self._prompt: NDArray[np.float64] | None = None

    def capacity(self, prompt: int) -> int:
        """`heavy + recent` and the row of the step."""
        return self.heavy + self.recent + 1

    def keep(self, q: Array, k: Array, options: dict[str, Any]) -> Mask | None:
        """The last rows and the best of the others by the prompt's own weights."""
        self._prompt = prompt_scores(q, k, options)
        return kept_of_prompt(self._prompt, self.heavy, self.recent)

    def start(self, kv_heads: int, slots: int) -> None:
        """Scores of 0."""
        super().start(kv_heads, slots)
        self.scores = np.zeros((kv_heads, slots))

    def admit(self, slots: NDArray[np.int64], first: int, **info: Any) -> None:
        """New rows score nothing, those of a prompt what its rows gave them."""
        super().admit(slots, first)
        self.put(self.scores, slots, 0.0 if self._prompt is None else self._prompt)
        self._prompt = None

    def observe(self, seen: NDArray[np.float32], step: int) -> None:
        """Adds the weights."""
        self.scores += seen

    def choose(self, step: int) -> Mask | None:
        """The lowest scores beyond the budget."""
        live = self.live
        candidates = live & (self.positions <= step - self.recent)
        return weakest(self.scores, candidates, live.sum(axis=1) - self.heavy - self.recent, self.positions)


def prompt_scores(q: Array, k: Array, options: dict[str, Any]) -> NDArray[np.float64]:
    """Weight that each key of a prompt receives from all of its rows and the heads of its group, `[Hkv, L]`.

    NaN, as a key that is none makes of them, counts as 0: beside it no score is the lowest.
    """
    mass = as_numpy(prob_reduce(q, k, column_mass=True, causal=True, **options).column_mass, "mass")
    return over_group(np.where(np.isnan(mass), 0, mass).astype(np.float64), k.shape[0], "sum")


def kept_of_prompt(scores: NDArray[np.float64], heavy: int, recent: int) -> Mask:
    """The `recent` last and the `heavy` best of the others, of equal ones the newer, as a boolean `[Hkv, L]`."""
    length = scores.shape[1]
    keep = np.arange(length) >= np.full((len(scores), 1), length - recent)
    older = max(length - recent, 0)
    keep[:, :older] = best(scores[:, :older][:, ::-1], heavy)[:, ::-1]
    return keep


METHOD = Method(
    name="heavy_hitter",
    family="kv",
    title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    year=2023,
    arxiv="2306.14048",
    function=HeavyHitter,
    reference=reference.HeavyHitter,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A budget of the whole text gives dense attention.",
        "No heavy rows leave a sliding window.",
        "The kept rows are those of a plain simulation at every step, and the last `recent` are among them.",
        "With a mean row, the result is attention over the kept rows and so many copies of the mean of the others.",
    ),
    tests="tests/kv/test_heavy_hitter.py",
    cost="A step reads `heavy + recent + 1` rows; 16 bytes per slot. A prompt costs two passes more.",
)
