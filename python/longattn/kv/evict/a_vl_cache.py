"""A-VL: visual rows in two tiers, text rows by accumulated weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import integer, real
from longattn.dense.attention_weights import attention_weights
from longattn.kv.evict.expiry import as_flags
from longattn.kv.evict.heavy_hitter import prompt_scores
from longattn.kv.evict.policy import Mask, Policy, best, weakest
from longattn.methods import Method
from longattn.reference import kv as reference


class AVLCache(Policy):
    """Keeps visual rows of a vision-language prompt in two tiers, and text rows as heavy hitters.

    Visual rows, at the end of the prompt: by the weight that the last query gives them, the mean of all heads, the
    best `secondary` percent are kept and the rest dropped, one choice for all heads. Of the kept ones the best `core`
    percent (of all visual rows) are core. A step reads core and text; every `refresh`-th step reads all kept visual
    rows, and picks the core anew by their weights.

    Text rows, of each KV head: weights are accumulated, of a prompt over all its rows; beyond `text` percent of the
    text that came so far the rows of lowest score go, those of the last half of the budget excepted, as in H2O.

    `EvictingCache.prefill` takes `visual`, boolean `[L]`; rows that come later are text. The shares are this library's
    defaults, those of the paper are not known for certain.

    Args:
        core: percent of the visual rows that every step reads.
        secondary: percent of the visual rows that are kept, at least `core`.
        text: percent of the text rows that are kept.
        refresh: steps from one reading of all kept visual rows to the next.
        text_budget: text rows that are kept, in place of `text`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: shares outside 0 to 100, or numbers that do not fit.

    References:
        "A-VL: Adaptive Attention for Large Vision-Language Models", 2024, arXiv:2409.14846.
    """

    observes = "mean"
    single = True

    def __init__(
        self,
        *,
        core: float = 10.0,
        secondary: float = 50.0,
        text: float = 50.0,
        refresh: int = 8,
        text_budget: int | None = None,
    ) -> None:
        self.core, self.secondary, self.text = (
            _percent(x, name) for x, name in ((core, "core"), (secondary, "secondary"), (text, "text"))
        )
        if self.core > self.secondary:
            raise ValueError(f"core: got {core}, expected at most secondary, {secondary}")
        self.refresh = integer(refresh, "refresh", 1)
        self.text_budget = None if text_budget is None else integer(text_budget, "text_budget", 1)
        self._visual: NDArray[np.int64] | None = None
        self._prompt: NDArray[np.float64] | None = None
        self._core_count = 0
        self._text_rows = 0
        self._steps = 0

    def capacity(self, prompt: int) -> None:
        """No limit: the text's share grows with it."""
        return

    def check(self, kv_heads: int, rows: int, **info: Any) -> dict[str, Any]:
        """Which rows of a prompt are visual."""
        unknown = set(info) - {"visual"}
        if unknown:
            raise TypeError(f"{min(unknown)}: got an argument that AVLCache does not take, expected visual")
        if info.get("visual") is None:
            return {}
        visual = as_flags(info["visual"], "visual")
        if visual.shape != (rows,):
            raise ValueError(f"visual: got shape {visual.shape}, expected ({rows},)")
        if hasattr(self, "positions") and visual.any():
            raise ValueError("visual: got visual rows after the prompt, expected them in the prompt")
        return {"visual": visual}

    def keep(self, q: Array, k: Array, options: dict[str, Any], visual: NDArray[np.bool_] | None = None) -> Mask | None:
        """Secondary visual rows, and the heavy hitters among the text."""
        kv_heads, length = k.shape[:2]
        visual = np.zeros(length, bool) if visual is None else visual
        places = np.flatnonzero(visual)
        self._core_count = _share(self.core, len(places))
        last = as_numpy(attention_weights(q, k, rows=[q.shape[1] - 1], causal=True, **options), "weights")
        importance = last[:, 0].mean(axis=0, dtype=np.float64)[places]
        kept_visual = best(importance, _share(self.secondary, len(places)))
        self._visual = np.full(length, -1)
        self._visual[places[kept_visual]] = np.arange(kept_visual.sum())
        self._core = best(importance[kept_visual], self._core_count)
        self._prompt = prompt_scores(q, k, options) / (q.shape[0] // kv_heads)
        self._text_rows = length - len(places)
        keep = np.zeros((kv_heads, length), bool)
        keep[:, places[kept_visual]] = True
        keep[:, ~visual] = True
        ages = np.broadcast_to(np.arange(length), keep.shape)
        gone = self._text_gone(keep & ~visual, self._prompt, ages, length - 1)
        return keep if gone is None else keep & ~gone

    def start(self, kv_heads: int, slots: int) -> None:
        """Nothing is known."""
        super().start(kv_heads, slots)
        self.scores = np.zeros((kv_heads, slots))
        #: Number of the visual row in each slot, -1 where there is none.
        self.visual_number = np.full((kv_heads, slots), -1)
        if self._visual is None:
            self._core = np.zeros(0, bool)

    def admit(self, slots: NDArray[np.int64], first: int, **info: Any) -> None:
        """Rows of a prompt come with what is known of them, later ones are text."""
        super().admit(slots, first)
        if self._visual is not None and self._prompt is not None:
            self.put(self.visual_number, slots, self._visual)
            self.put(self.scores, slots, self._prompt)
            self._prompt = None
            return
        self.put(self.visual_number, slots, -1)
        self.put(self.scores, slots, 0.0)
        self._text_rows += slots.shape[1]

    def within(self, step: int) -> Mask | None:
        """Text, and the core or all visual rows."""
        self._steps += 1
        if self._steps % self.refresh == 0 or not len(self._core):
            return None
        return np.asarray(self.live & ((self.visual_number < 0) | self._core[self.visual_number]))

    def observe(self, seen: NDArray[np.float32], step: int) -> None:
        """Adds weights of text rows; where all visual rows were read, picks the core."""
        self.scores += seen
        if len(self._core) and self._steps % self.refresh == 0:
            heads, slots = np.nonzero(self.live & (self.visual_number >= 0))
            numbers = self.visual_number[heads, slots]
            importance = np.bincount(numbers, seen[heads, slots], len(self._core))
            self._core = best(importance, self._core_count)

    def choose(self, step: int) -> Mask | None:
        """The lowest scores of the text beyond its budget."""
        return self._text_gone(self.live & (self.visual_number < 0), self.scores, self.positions, step)

    @property
    def core_rows(self) -> NDArray[np.int64]:
        """Numbers of the core rows among the kept visual ones, ascending."""
        return np.flatnonzero(self._core)

    def _text_gone(self, text: Mask, scores: NDArray[np.float64], ages: NDArray[Any], step: int) -> Mask | None:
        budget = _share(self.text, self._text_rows) if self.text_budget is None else self.text_budget
        recent = max(budget // 2, 1)
        excess = text.sum(axis=1) - budget
        if excess.max(initial=0) <= 0:
            return None
        newest = np.sort(np.where(text, ages, -1), axis=1)[:, -recent][:, None]
        candidates = text & (ages < newest)
        return weakest(scores, candidates, np.minimum(excess, candidates.sum(axis=1)), ages)


def fastv_keep(importance: Array, visual: Array, share: float) -> NDArray[np.int64]:
    """Rows that later layers keep, in the manner of FastV: all text, and the `share` percent best visual rows.

    Args:
        importance: floating `[L]`: weight of each row from the last query, the mean of the heads.
        visual: boolean `[L]`.
        share: percent of the visual rows that stay.

    Returns:
        Their positions, ascending, int64.

    Raises:
        TypeError: an argument of another kind.
        ValueError: shapes that do not fit, or a share outside 0 to 100.
    """
    s, seen = as_numpy(importance, "importance"), as_flags(visual, "visual")
    if s.ndim != 1 or seen.shape != s.shape:
        raise ValueError(f"visual: got shape {seen.shape} with importance {s.shape}, expected [L] for both")
    places = np.flatnonzero(seen)
    keep = ~seen
    keep[places[best(s[places].astype(np.float64), _share(_percent(share, "share"), len(places)))]] = True
    return np.flatnonzero(keep)


def _percent(value: object, name: str) -> float:
    number = float(value) if isinstance(value, int) and not isinstance(value, bool) else real(value, name)
    if not 0 <= number <= 100:
        raise ValueError(f"{name}: got {value}, expected a percentage, 0 to 100")
    return number


def _share(percent: float, count: int) -> int:
    """Rows that a percentage of `count` is, rounded up."""
    return math.ceil(percent * count / 100 - 1e-9)


METHOD = Method(
    name="a_vl_cache",
    family="kv",
    title="A-VL: Adaptive Attention for Large Vision-Language Models",
    year=2024,
    arxiv="2409.14846",
    function=AVLCache,
    reference=reference.AVLCache,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Shares of 100 percent give dense attention.",
        "A refresh of 1 reads all kept visual rows in every step.",
        "Without visual rows the kept rows are those of H2O.",
        "What a step reads in place is attention over a copy of those rows.",
    ),
    tests="tests/kv/test_a_vl_cache.py",
    cost="A step reads `core` percent of the visual rows and the kept text, every `refresh`-th all kept rows.",
)
