"""SnapKV: of a prompt, what its last queries look at."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import integer, one_of
from longattn.dense.prob_reduce import prob_reduce
from longattn.kv.evict.policy import Mask, Policy, best, over_group
from longattn.methods import Method
from longattn.reference import kv as reference

POOLINGS = ("avg", "max")


class SnapKV(Policy):
    """Compresses a prompt to `budget` rows per KV head; what is generated after it is kept.

    The last `window` queries of the prompt vote: their causal weights are summed over the window for each earlier
    key and query head, pooled along the keys (neighbours of important keys come along), and averaged over the query
    heads of a group. The `budget - window` keys of most votes are kept, and the window itself. A prompt of at most
    `budget` rows is kept whole.

    Args:
        budget: rows kept of the prompt, more than `window`.
        window: queries that vote, and last rows that are kept.
        kernel: keys that are pooled, an odd number. Beyond the ends there are zeros.
        pooling: "avg" or "max".
        reduce: how the votes of a group's query heads become one: "mean" or "max" (the paper has one list per query
            head; here rows are shared by the group).

    Raises:
        TypeError: a number is no integer.
        ValueError: sizes that do not fit, or an unknown pooling or reduction.

    References:
        Y. Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", 2024, arXiv:2404.14469.
    """

    def __init__(
        self, budget: int, *, window: int = 32, kernel: int = 5, pooling: str = "avg", reduce: str = "mean"
    ) -> None:
        self.window = integer(window, "window", 1)
        self.budget = integer(budget, "budget", self.window + 1)
        self.kernel = integer(kernel, "kernel", 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: got {kernel}, expected an odd number")
        one_of(pooling, "pooling", POOLINGS)
        one_of(reduce, "reduce", ("mean", "max"))
        self.pooling, self.reduce = pooling, reduce

    def capacity(self, prompt: int) -> None:
        """No limit: what is generated is kept."""
        return

    def keep(self, q: Array, k: Array, options: dict[str, Any]) -> Mask | None:
        """The voted keys and the window."""
        kv_heads, length = k.shape[0], k.shape[1]
        if length <= self.budget:
            return None
        votes = prob_reduce(q[:, length - self.window :], k, column_mass=True, causal=True, **options).column_mass
        earlier = as_numpy(votes, "votes")[:, : length - self.window]
        pooled = over_group(_pooled(earlier, self.kernel, self.pooling), kv_heads, self.reduce)
        keep = np.ones((kv_heads, length), bool)
        keep[:, : length - self.window] = best(pooled, self.budget - self.window)
        return keep

    def choose(self, step: int) -> Mask | None:
        """None: only the prompt is compressed."""
        return None


def _pooled(x: NDArray[Any], kernel: int, pooling: str) -> NDArray[Any]:
    # One that reaches over all keys from either end pools as any larger one does.
    kernel = min(kernel, 2 * x.shape[1] + 1)
    side = kernel // 2
    windows = sliding_window_view(np.pad(x, ((0, 0), (side, side))), kernel, axis=1)
    pooled: NDArray[Any] = windows.mean(axis=-1) if pooling == "avg" else windows.max(axis=-1)
    return pooled


METHOD = Method(
    name="snap_kv",
    family="kv",
    title="SnapKV: LLM Knows What You are Looking for Before Generation",
    year=2024,
    arxiv="2404.14469",
    function=SnapKV,
    reference=reference.SnapKV,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A prompt within the budget is kept whole, and steps are dense attention.",
        "Without pooling the kept keys are those of most weight from the window.",
        "The window and all generated rows are kept, and exactly `budget` rows of the prompt.",
        "With a mean row, the result is attention over the kept rows and so many copies of the mean of the others.",
    ),
    tests="tests/kv/test_snap_kv.py",
    cost="For a prompt, `window` rows of weights once more and a sort of its keys; a step reads what is kept.",
)
