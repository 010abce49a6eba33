"""Timing that survives a shared machine: candidates take turns, limits are measured in between."""

from __future__ import annotations

import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

import longattn as la
from longattn import _core, doctor
from longattn.bench.results import Row
from longattn.bench.tables import count

READ_BYTES, QUICK_READ_BYTES = 512 << 20, 16 << 20


@dataclass(frozen=True)
class Candidate:
    """One way to a result. A peer's failure is reported, longattn's own is not caught."""

    name: str
    call: Callable[[], Any]
    peer: bool = True


@dataclass(frozen=True)
class Outcome:
    """Seconds of the timed calls, what the first call returned, and why there are no times, if so.

    Where calls come in bursts, `seconds` are means of a burst and `leading` are its first calls.
    """

    seconds: tuple[float, ...]
    result: Any = None
    failure: str | None = None
    leading: tuple[float, ...] = ()

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    def columns(self) -> dict[str, Any]:
        """The figures of a table row."""
        if self.failure:
            return {"ms": None, "ms_min": None, "ms_max": None, "calls": 0, "failure": self.failure}
        ms = [1e3 * s for s in self.seconds]
        first = {"ms_first": 1e3 * statistics.median(self.leading)} if self.leading else {}
        return {"ms": statistics.median(ms), "ms_min": min(ms), "ms_max": max(ms), "calls": len(ms), **first}


class Bench:
    """Settings of one run, and the limits measured in it.

    Args:
        threads: counts to measure in turn, of longattn, torch and the limits; None is longattn's setting.
        rounds: timed calls per candidate.
        budget_s: seconds of timed calls per peer; a slow one is called less often, and one whose first call
            takes longer is not called again.
        quick: tiny shapes.
        peers: compare with torch where it is installed.
    """

    def __init__(
        self, *, threads: Sequence[int] | None, rounds: int, budget_s: float, quick: bool, peers: bool
    ) -> None:
        if rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {rounds}")
        self.thread_counts = tuple(threads or [la.get_num_threads()])
        self.rounds, self.budget_s, self.quick = rounds, budget_s, quick
        self.notes: list[str] = []
        self.peers = peers and importlib.util.find_spec("torch") is not None
        if peers and not self.peers:
            self.notes.append("torch is not installed: no peers. pip install 'longattn[torch]'")
        self._limits: dict[int, dict[str, list[float]]] = {}
        self.use(self.thread_counts[0])

    def each_threads(self) -> Iterator[int]:
        """Every thread count in turn, set for longattn and torch while the caller uses it."""
        for threads in self.thread_counts:
            self.use(threads)
            yield threads

    def use(self, threads: int) -> None:
        """Sets the number of threads of longattn, torch and the limits."""
        self.threads = threads
        if la.get_num_threads() != threads:
            la.set_num_threads(threads)
        if self.peers:
            import torch

            torch.set_num_threads(threads)

    def describe(self, routine: str, command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a result says about itself."""
        plain = {key: value for key, value in settings.items() if isinstance(value, int | float | str | list)}
        return {
            "routine": routine,
            "command": command,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "threads": list(self.thread_counts),
            "settings": plain,
            "machine": doctor.machine(),
        }

    def interleave(self, candidates: Sequence[Candidate], *, burst_s: float = 0.0) -> dict[str, Outcome]:
        """Calls every candidate once to warm up, then all in turns; reads memory once a round.

        The order is another one in each round, drawn by its number: who comes first finds caches that hold other memory
        and threads asleep, who comes after a peer finds what that one read.

        With `burst_s` a turn is as many calls as take that long, whoever's they are, and counts with their mean: what
        steps cost that follow each other. A single call of a millisecond that comes after something else finds its
        threads asleep, its code and tables out of the caches and the clock low; the first call of each burst says so.
        """
        times: dict[str, list[float]] = {}
        leading: dict[str, list[float]] = {}
        calls: dict[str, int] = {}
        firsts: dict[str, Any] = {}
        failures: dict[str, str] = {}
        for candidate in candidates:
            name = candidate.name
            try:
                seconds, firsts[name] = timed(candidate.call)
            except RuntimeError as error:
                if not candidate.peer:
                    raise
                failures[name] = reason(error)
                continue
            calls[name] = min(self.rounds, int(self.budget_s / seconds)) if candidate.peer else self.rounds
            times[name] = [] if calls[name] else [seconds]
        for turn in range(self.rounds):
            self._keep("read_gb_s", self.read_gb_s())
            for candidate in random.Random(turn).sample(candidates, len(candidates)):
                if turn < calls.get(candidate.name, 0):
                    first, mean = burst(candidate.call, burst_s)
                    times[candidate.name].append(mean)
                    if burst_s:
                        leading.setdefault(candidate.name, []).append(first)
        done = {
            name: Outcome(tuple(seconds), firsts[name], leading=tuple(leading.get(name, ())))
            for name, seconds in times.items()
        }
        return done | {name: Outcome((), failure=failure) for name, failure in failures.items()}

    def read_gb_s(self) -> float:
        """Bandwidth of reading memory with the current number of threads, now."""
        gb_s: float = _core.read_bandwidth(QUICK_READ_BYTES if self.quick else READ_BYTES, self.threads)
        return gb_s

    def recent_read_gb_s(self) -> float:
        """Median over the last `interleave`."""
        return statistics.median(self._limits[self.threads]["read_gb_s"][-self.rounds :])

    def fma_gflop_s(self) -> float:
        """Multiply-add rate of the current number of threads, now; kept for `limits`."""
        return self._keep("fma_gflop_s", _core.fma_peak(self.threads))

    def _keep(self, limit: str, value: float) -> float:
        self._limits.setdefault(self.threads, {}).setdefault(limit, []).append(value)
        return value

    def limits(self) -> dict[str, Any]:
        """The machine's limits as measured between the candidates, by thread count."""
        return {
            str(threads): {name: spread(values) for name, values in found.items()}
            for threads, found in sorted(self._limits.items())
        }

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(text, file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """Why a peer failed: the kind of error and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def burst(call: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Seconds of the first of calls that follow each other for so long, at least one, and their mean."""
    start = time.perf_counter()
    call()
    first = taken = time.perf_counter() - start
    n = 1
    while taken < seconds:
        call()
        n += 1
        taken = time.perf_counter() - start
    return first, taken / n


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rows_of(outcomes: Mapping[str, Outcome], ours: str | None, case: Mapping[str, Any]) -> list[Row]:
    """A row per candidate: the case, the times, and how many times as long as `ours` it took, if that ran."""
    fastest = outcomes[ours].median_ms if ours else None
    rows = []
    for name, outcome in outcomes.items():
        ratio = None if outcome.failure or fastest is None else outcome.median_ms / fastest
        mine = name.startswith("longattn")
        rows.append({**case, "method": name, "ours": mine, **outcome.columns(), "times_ours": ratio})
    return rows


def slopes(rows: Sequence[Row], by: Sequence[str], figure: str = "ms") -> list[Row]:
    """Growth exponent of a figure over `keys`: the slope of its logarithm over the logarithm of the length.

    Args:
        rows: of a result.
        by: keys that rows of one line share; a line needs two lengths or more.
        figure: what grows, positive.

    Returns:
        Per line its keys, `of` (all of them in words) and `slope`.
    """
    lines: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        if row.get(figure) is not None:
            lines.setdefault(tuple(row[key] for key in by), {})[row["keys"]] = row[figure]
    return [
        {
            **dict(zip(by, line, strict=True)),
            "of": ", ".join(_in_words(key, value) for key, value in zip(by, line, strict=True)),
            "slope": float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0]),
        }
        for line, points in lines.items()
        if len(points) > 1
    ]


def _in_words(key: str, value: Any) -> str:
    if key == "threads":
        return count(value)
    return f"D {value}" if key == "head_dim" else str(value)
