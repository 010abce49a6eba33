"""Timing that survives a shared machine: candidates take turns, limits are measured in between."""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn import _core, doctor

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
READ_BYTES, QUICK_READ_BYTES = 512 << 20, 16 << 20


@dataclass(frozen=True)
class Candidate:
    """One way to a result. A peer's failure is reported, longattn's own is not caught."""

    name: str
    call: Callable[[], Any]
    peer: bool = True


@dataclass(frozen=True)
class Outcome:
    """Seconds of the timed calls, what the first call returned, and why there are no times, if so."""

    seconds: tuple[float, ...]
    result: Any = None
    failure: str | None = None

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    def columns(self) -> dict[str, Any]:
        """The figures of a table row."""
        if self.failure:
            return {"ms": None, "ms_min": None, "ms_max": None, "calls": 0, "failure": self.failure}
        ms = [1e3 * s for s in self.seconds]
        return {"ms": statistics.median(ms), "ms_min": min(ms), "ms_max": max(ms), "calls": len(ms)}


class Bench:
    """Settings of one run, and the limits measured in it.

    Args:
        threads: of longattn, torch and the limits; None keeps longattn's setting.
        rounds: timed calls per candidate.
        budget_s: a peer whose first call takes longer is not called again.
        quick: tiny shapes.
        peers: compare with torch where it is installed.
    """

    def __init__(self, *, threads: int | None, rounds: int, budget_s: float, quick: bool, peers: bool) -> None:
        if rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {rounds}")
        if threads is not None:
            la.set_num_threads(threads)
        self.threads = la.get_num_threads()
        self.rounds, self.budget_s, self.quick = rounds, budget_s, quick
        self.notes: list[str] = []
        self.peers = peers and importlib.util.find_spec("torch") is not None
        if self.peers:
            import torch

            torch.set_num_threads(self.threads)
        elif peers:
            self.notes.append("torch is not installed: no peers. pip install 'longattn[torch]'")
        self._read: list[float] = []
        self._fma: list[float] = []

    def describe(self, routine: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a result says about itself."""
        plain = {key: value for key, value in settings.items() if isinstance(value, int | float | str | list)}
        return {
            "routine": routine,
            "command": " ".join(["longattn", *sys.argv[1:]]),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "threads": self.threads,
            "settings": plain,
            "machine": doctor.machine(),
        }

    def interleave(self, candidates: Sequence[Candidate]) -> dict[str, Outcome]:
        """Calls every candidate once to warm up, then all in turns; reads memory once a round."""
        times: dict[str, list[float]] = {}
        firsts: dict[str, Any] = {}
        failures: dict[str, str] = {}
        active = []
        for candidate in candidates:
            try:
                seconds, firsts[candidate.name] = timed(candidate.call)
            except (RuntimeError, NotImplementedError) as error:
                if not candidate.peer:
                    raise
                failures[candidate.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            if candidate.peer and seconds > self.budget_s:
                times[candidate.name] = [seconds]
            else:
                times[candidate.name] = []
                active.append(candidate)
        for _ in range(self.rounds):
            self._read.append(self.read_gb_s())
            for candidate in active:
                times[candidate.name].append(timed(candidate.call)[0])
        done = {name: Outcome(tuple(seconds), firsts[name]) for name, seconds in times.items()}
        return done | {name: Outcome((), failure=failure) for name, failure in failures.items()}

    def read_gb_s(self) -> float:
        """Bandwidth of reading memory with all threads, now."""
        gb_s: float = _core.read_bandwidth(QUICK_READ_BYTES if self.quick else READ_BYTES, self.threads)
        return gb_s

    def recent_read_gb_s(self) -> float:
        """Median over the last `interleave`."""
        return statistics.median(self._read[-self.rounds :])

    def fma_gflop_s(self) -> float:
        """Multiply-add rate of all threads, now; kept for `limits`."""
        self._fma.append(_core.fma_peak(self.threads))
        return self._fma[-1]

    def limits(self) -> dict[str, Any]:
        """The machine's limits as measured between the candidates."""
        return {
            name: spread(values) for name, values in (("read_gb_s", self._read), ("fma_gflop_s", self._fma)) if values
        }

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(text, file=sys.stderr, flush=True)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rows_of(outcomes: Mapping[str, Outcome], ours: str, case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per candidate: the case, the times, and by what factor longattn is faster."""
    fastest = outcomes[ours].median_ms
    rows = []
    for name, outcome in outcomes.items():
        ratio = None if outcome.failure else outcome.median_ms / fastest
        rows.append({**case, "method": name, "ours": name == ours, **outcome.columns(), "times_ours": ratio})
    return rows


def slopes(rows: Sequence[Mapping[str, Any]], name: Callable[[Mapping[str, Any]], str]) -> dict[str, float]:
    """Growth exponent of time over `keys` of every `name` that was timed at two lengths or more."""
    grown: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["ms"] is not None:
            grown.setdefault(name(row), {})[row["keys"]] = row["ms"]
    return {
        of: float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])
        for of, points in grown.items()
        if len(points) > 1
    }


def aligned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Uninitialised array on a cache line, so that no candidate suffers from where the allocator put it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array: NDArray[Any] = raw[start : start + size].view(dtype).reshape(shape)
    return array


def gaussian(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Independent normal numbers: good enough for what is timed only."""
    array = aligned(shape, dtype)
    for i in np.ndindex(shape[:-2]):  # matrix by matrix: no float32 copy of the whole
        array[i] = rng.standard_normal(shape[-2:], dtype=np.float32)
    return array


def integers(text: str) -> list[int]:
    """Argument type: `1024,4096`."""
    return [int(part) for part in text.split(",")]


def dtypes(text: str) -> list[str]:
    """Argument type: `float32,bfloat16`."""
    names = text.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    return names
