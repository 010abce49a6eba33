"""Layers that keep a part of their keys instead of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from longattn._checks import function, integer, one_of
from longattn.kv.evict import by_name
from longattn.kv.evict.cache import EvictingCache
from longattn.transformers._onward import OnwardSequence
from longattn.transformers.sequence import ReadCounts, ScoreOptions

Info = Callable[[torch.Tensor, torch.Tensor, int], Mapping[str, Any]]
"""New keys `[Hkv, L, D]`, new values and the position of the first, to what a policy wants to know of these rows."""


@dataclass(frozen=True)
class EvictionConfig:
    """An eviction policy of one layer: the arguments of `longattn.kv.evict.make`.

    The prompt is attended to as the policy says, in one forward pass (of a longer one, rows that come after the first
    pass come one by one), and cut to what it keeps. What was evicted does not come back: a layer with a policy cannot
    be cropped, and its sequences cannot be copied, so no beam search and no assisted decoding.

    Args:
        policy: kind of the policy, one of `longattn.kv.evict.KINDS`.
        rows: rows that each KV head keeps.
        sinks: first rows that are kept, by the kinds that have such.
        window: last rows that are kept, likewise.
        parameters: the kind's own arguments, in place of what the budget gives.
        residual: "mean" folds evicted rows into a mean row; `None` leaves it to the policy.
        info: for kinds that are told what to keep (`nats_attention`: types, `attention_gate_evict`: flags).

    Raises:
        TypeError: a parameter that the policy does not have, or numbers of another kind.
        ValueError: an unknown kind, or a value out of range.
    """

    policy: str
    rows: int = 4096
    sinks: int = 4
    window: int = 64
    parameters: Mapping[str, Any] = field(default_factory=dict)
    residual: str | None = None
    info: Info | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        if not isinstance(self.parameters, Mapping):
            raise TypeError(
                f"parameters: got {type(self.parameters).__name__}, expected a mapping from names to values"
            )
        by_name.check(self.policy, self.parameters)
        if self.info is not None:
            function(self.info, "info")
        for name, least in (("rows", 1), ("sinks", 0), ("window", 0)):
            integer(getattr(self, name), name, least)
        one_of(self.residual, "residual", ("mean", None))
        needs = by_name.KINDS[self.policy].needs
        if needs == "types" and self.info is None:
            raise ValueError(f"info: got None, expected a function that gives {needs} to {self.policy}")


class EvictedSequence(OnwardSequence):
    """What a policy keeps of one sequence in one layer, padding left out."""

    REFUSAL = "eviction: got a copy of a sequence (beam search, say), expected none with an eviction policy"

    def __init__(self, how: EvictionConfig, *, kv_heads: int, head_dim: int, value_dim: int, dtype: str) -> None:
        super().__init__()
        self._how, self._kv_heads = how, kv_heads
        self._sizes: dict[str, Any] = {"head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}
        self._cache: EvictingCache | None = None

    @property
    def nbytes(self) -> int:
        """Host memory of the rows that are kept."""
        return 0 if self._cache is None else self._cache.stats.nbytes

    @property
    def index_nbytes(self) -> int:
        """Host memory of what the policy keeps beside them."""
        return 0 if self._cache is None else self._cache.stats.policy_nbytes

    def attend(
        self,
        query: torch.Tensor,
        options: ScoreOptions,
        *,
        decode: bool,
        dense: torch.Tensor | None,
        counts: ReadCounts,
        out: torch.Tensor,
    ) -> None:
        """Attention of the rows that came last to what is kept and to themselves; `Sequence.attend` says more."""
        if query.shape[1] == 0 or self._new is None:  # nothing but padding arrived
            return
        assert dense is None  # the layer refuses such masks
        (k, v), self._new = self._new, None
        first = self._arrived - k.shape[1]
        if self._cache is None:
            self._cache = self._made(options)
            out.copy_(self._cache.prefill(query, k, v, **self._told(k, v, first)))
            return
        for row in range(k.shape[1]):
            one = slice(row, row + 1)
            self._cache.append(k[:, one], v[:, one], **self._told(k[:, one], v[:, one], first + row))
            out[:, one] = self._cache.attend(query[:, one])
            if decode:
                read = round(self._cache.stats.attended * self._kv_heads)
                counts.add((first + row + 1) * self._kv_heads, read, 0.0, query.shape[0])

    def _made(self, options: ScoreOptions) -> EvictingCache:
        how = self._how
        sizes = {"sinks": how.sinks, "window": how.window}
        policy = by_name.make(how.policy, how.rows, kv_heads=self._kv_heads, **sizes, **how.parameters)
        return EvictingCache(policy, self._kv_heads, residual=how.residual, **self._sizes, **options)

    def _told(self, k: torch.Tensor, v: torch.Tensor, first: int) -> dict[str, Any]:
        return {} if self._how.info is None else dict(self._how.info(k, v, first))
