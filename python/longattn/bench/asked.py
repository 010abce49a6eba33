"""A data set in a store, asked through one way to read a part of it after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn import vectors
from longattn.bench import quality
from longattn.bench.arrays import DTYPES
from longattn.bench.harness import timed
from longattn.retrieval.ways import Way


@dataclass(frozen=True)
class Built:
    """A way, its index over the store, and the seconds that it took to make."""

    way: Way
    index: la.index.Index
    seconds: float


class Asked:
    """A store that holds a data set, or its first rows, and the queries that ask it.

    Attributes:
        data: the set.
        store: its rows, or the first of them.
        queries: `[groups, Hq, D]` in the store's dtype; they may be replaced.
        sinks: first rows that are always read.
        window: last rows that are always read.
    """

    def __init__(self, data: vectors.Vectors, store: la.KVStore, dtype: str, sinks: int, window: int) -> None:
        self.data, self.store, self.sinks, self.window = data, store, sinks, window
        self.queries = data.queries.astype(DTYPES[dtype])

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values."""
        return int(self.store.keys.nbytes + self.store.values.nbytes)

    def build(self, way: Way) -> Built:
        """The way's index over all rows that the store has."""
        queries = np.ascontiguousarray(self.data.prefill_queries.transpose(1, 0, 2)) if way.queries else None

        def index() -> la.index.Index:
            made = way.index(self.store, queries)
            made.update()
            return made

        seconds, made = timed(index)
        return Built(way, made, seconds)

    def retrieve(self, built: Built, query: NDArray[Any], top_k: int, *, listed: bool = False) -> la.RetrievalResult:
        """One query `[Hq, 1, D]` through the way, with `top_k` rows beside sinks and window, or its own."""
        return la.retrieval_attention(
            query,
            self.store,
            built.index,
            sinks=self.sinks,
            window=self.window,
            return_selected=listed,
            **built.way.budget(top_k),
        )

    def rotating(self, built: Built, top_k: int) -> Callable[[], la.RetrievalResult]:
        """A call that asks the next query each time, so that no selection stays in the caches."""
        rotation = itertools.cycle(np.ascontiguousarray(self.queries[:, :, None]))
        return lambda: self.retrieve(built, next(rotation), top_k)

    def ask(self, built: Built, top_k: int) -> tuple[list[quality.Retrieved], dict[str, Any]]:
        """Every query through the way: what it found, and the shares of rows and bytes that were read."""
        results = [self.retrieve(built, query[:, None], top_k, listed=True) for query in self.queries]
        stats = [result.stats for result in results if result.stats is not None]
        attended = float(np.mean([s.keys_attended.mean() for s in stats]) / len(self.store))
        index_bytes = np.mean([s.index_bytes.sum() for s in stats])
        read = {"rows_read": attended, "bytes_read": attended + float(index_bytes) / self.kv_bytes}
        return [retrieved(result) for result in results], read

    def assess(self, built: Mapping[str, Built], budgets: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """What each way finds and how far its output is from exact attention's."""
        answers = {name: self.ask(way, budgets[name]) for name, way in built.items()}
        figures = self.compare({name: found for name, (found, _) in answers.items()})
        return {name: figures[name] | read for name, (_, read) in answers.items()}

    def compare(self, found: Mapping[str, list[quality.Retrieved]]) -> dict[str, dict[str, Any]]:
        """Answers to the queries against exact attention."""
        return quality.assess(
            self.queries.astype(np.float32),
            self.store.keys,
            self.store.values,
            found,
            sinks=self.sinks,
            window=self.window,
            heads=self.data.heads,
        )


def retrieved(result: la.RetrievalResult) -> quality.Retrieved:
    """What one query gave, for `quality.assess`."""
    stats = result.stats
    assert stats is not None  # one query
    return quality.Retrieved(
        out=result.out[:, 0],
        out_rows_only=result.out[:, 0],
        selected=[rows for (rows,) in stats.selected],
        missed=stats.missed_mass[:, 0],
        missed_bound=stats.missed_mass_bound[:, 0],
    )
