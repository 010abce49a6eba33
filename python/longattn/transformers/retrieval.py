"""When and how a layer reads a part of its keys instead of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from longattn._checks import any_integer, finite, one_of
from longattn.index import by_name
from longattn.retrieval._budgets import RESTS, count, rows_or_mass, sampling


@dataclass(frozen=True)
class RetrievalConfig:
    """Retrieval attention of one layer during decoding: the arguments of `longattn.retrieval_attention`.

    Args:
        top_k: keys selected per KV head beyond `sinks` and `window`, shared by the head's query group.
        top_p: instead of `top_k`: the fewest keys that hold this share of the estimated softmax mass. Without
            either, 1 % of the keys are selected, at least 64.
        sinks: first keys of the sequence, always read.
        window: last keys of the sequence, always read.
        index: kind of the index, one of `longattn.index.KINDS`.
        parameters: of the index, for instance `{"page_size": 32}` for pages. Kinds that learn from queries get
            some of each prefill by themselves.
        rest: what stands for the keys that are not read: `"values"` (an estimate of their part), `"none"`, or
            `"sampled"` (an estimate that a sample of them corrects, half of `top_k`); `None` is an estimate where the
            index makes one.
        min_length: sequences shorter than this are attended exactly.
        error: chooses `top_k` for each KV head: the last queries of a prefill try budgets from the smallest on, until
            the mean error of a head's outputs is at most this share of its values' root mean square norm
            (`longattn.retrieval.probe_budgets`). The choice holds until the next prefill of at least 16 tokens;
            before the first, 1 % of the keys are selected, at least 64.
        epsilon: instead of a budget: as many keys as keep each head's output within this share of what `relative_to`
            says, or else all (`longattn.retrieval.verified_sparse_attention`). Like `rest="sampled"` for indexes that
            weigh single keys, `longattn.index.by_name.WEIGH_ROWS`.
        delta: chance that an output is further off; `None` is 0.05. With `epsilon` only.
        relative_to: `"output"` (what `None` is) or `"values"`. With `epsilon` only.
        seed: of the random numbers of samples.

    Raises:
        TypeError: a parameter that the index does not have, or numbers of another kind.
        ValueError: a value outside the range stated above, several of `top_k`, `top_p`, `error` and `epsilon`, or
            samples of an index that weighs no single keys.
    """

    top_k: int | None = None
    top_p: float | None = None
    sinks: int = 4
    window: int = 512
    index: str = "signatures"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rest: Literal["values", "none", "sampled"] | None = None
    min_length: int = 2048
    error: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    relative_to: Literal["output", "values"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.top_k is not None:
            any_integer(self.top_k, "top_k")  # one for all heads
        rows_or_mass(self.top_k, self.top_p, 1, 1)
        for name in ("sinks", "window", "min_length"):
            count(getattr(self, name), name)
        if self.error is not None:
            if self.top_k is not None or self.top_p is not None:
                raise ValueError(f"error: got {self.error!r} beside top_k or top_p, expected it alone")
            if finite(self.error, "error") <= 0:
                raise ValueError(f"error: got {self.error!r}, expected a number above 0")
            if self.epsilon is not None:
                raise ValueError(f"error: got {self.error!r} beside epsilon={self.epsilon!r}, expected one of the two")
        one_of(self.rest, "rest", RESTS)
        one_of(self.index, "index", by_name.KINDS)
        if not isinstance(self.parameters, Mapping):
            raise TypeError(
                f"parameters: got {type(self.parameters).__name__}, expected a mapping from names to values"
            )
        by_name.check(self.index, dict(self.parameters))
        sampling(
            None if self.index in by_name.WEIGH_ROWS else self.index,
            self.seed,
            self.rest,
            self.epsilon,
            self.delta,
            self.relative_to,
            self.top_k,
            self.top_p,
        )
