"""Recorded sets: a model's queries, keys and values, made once, cached, and taken head by head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn.vectors import cache
from longattn.vectors.synthetic import Floats, Head

Progress = Callable[[int, int], None]
"""Called with (done, total) while vectors are made."""

ARRAYS = ("keys", "values", "queries", "prefill_queries")
FURTHER = "further_queries"
Arrays = Mapping[str, NDArray[np.float16]]
"""Keys, values `[heads, length, head_dim]`; queries, prefill queries `[heads, groups, group, head_dim]`, and maybe
further queries, of which some are taken where more are asked for than there are queries."""


@dataclass(frozen=True)
class Source:
    """How a recorded set comes to be.

    Attributes:
        name: of the set.
        key: version key of the cache; another recipe or model has another one.
        default_heads: the heads to load when none are named; None for all.
        record: runs the model; returns the arrays and facts to keep with them (`heads` are the heads' names).
    """

    name: str
    key: Callable[[], str]
    default_heads: tuple[str, ...] | None
    record: Callable[[Progress], tuple[Arrays, Mapping[str, Any]]]

    def prepare(self, refresh: bool, progress: Progress) -> Path:
        """Record and cache the set unless the cache has it."""
        key = self.key()
        if refresh or not cache.has(key):
            arrays, about = self.record(progress)
            cache.write(key, {name: arrays[name] for name in (*ARRAYS, FURTHER) if name in arrays}, about)
        return cache.folder(key)

    def open(self) -> Recording:
        """The cached set.

        Raises:
            FileNotFoundError: it has not been made; the message names the command that does.
        """
        key = self.key()
        if not cache.has(key):
            raise FileNotFoundError(
                f"vectors {self.name!r}: not in the cache ({cache.folder(key)}); "
                f"make them with `longattn vectors --name {self.name}`"
            )
        heads = tuple(cache.meta(key)["heads"])
        arrays = {array: cache.read(key, array) for array in ARRAYS}
        further = cache.read(key, FURTHER) if cache.has_array(key, FURTHER) else arrays["queries"][:, :0]
        return Recording(self.name, heads, self.default_heads or heads, **arrays, further_queries=further)


@dataclass(frozen=True)
class Recording:
    """A cached set, memory-mapped; shapes as in `Arrays`."""

    name: str
    heads: tuple[str, ...]
    default_heads: tuple[str, ...]
    keys: NDArray[np.float16]
    values: NDArray[np.float16]
    queries: NDArray[np.float16]
    prefill_queries: NDArray[np.float16]
    further_queries: NDArray[np.float16]

    @property
    def groups(self) -> int:
        """Most query groups that can be asked for."""
        return int(self.queries.shape[1] + self.further_queries.shape[1])

    def head(self, name: str, length: int, groups: int, seed: int) -> Head:
        """Head `name` with its first `length` keys and `groups` query groups, drawn alike for every head.

        More groups than there are queries are all of these and the first of the further ones.

        Raises:
            ValueError: more keys or groups than were recorded.
        """
        recorded, available = self.keys.shape[1], self.queries.shape[1]
        if length > recorded:
            raise ValueError(f"length: {self.name} was recorded with {recorded} keys, got {length}")
        if groups > self.groups:
            raise ValueError(f"groups: {self.name} has {self.groups}, got {groups}")
        i = self.heads.index(name)
        drawn = np.sort(np.random.default_rng(seed).choice(available, min(groups, available), replace=False))
        further = self.further_queries[i, : max(groups - available, 0)]
        return (
            _floats(self.keys[i, :length]),
            _floats(self.values[i, :length]),
            _floats(np.concatenate([self.queries[i][drawn], further])),
            _floats(self.prefill_queries[i]),
        )


def _floats(array: NDArray[np.float16]) -> Floats:
    return np.ascontiguousarray(array, dtype=np.float32)
