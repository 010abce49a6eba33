"""Routines with a row for every method of some families, beside a plain torch formulation where one is natural.

Weights and features are random, so that times mean something and results do not. `error` is the largest difference
between both results, the first of them where a method has several.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longattn.bench import peers
from longattn.bench.harness import Bench, Candidate, rows_of
from longattn.bench.kept import Kept
from longattn.bench.plots import Bars, Panel
from longattn.bench.results import Result, Row
from longattn.bench.sections import all_rows, titled, values_of
from longattn.bench.tables import Column, count, table
from longattn.methods import methods

PEER = "torch"
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("size", "size"),
    Column("method", "method"),
    Column("ms", "ms", ".4g"),
    Column("min", "ms_min", ".4g"),
    Column("max", "ms_max", ".4g"),
    Column("calls", "calls"),
    Column("× torch", "times_ours", ".2f"),
    Column("error", "error", ".1e"),
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Call = Callable[[], Any]


def call_with(*arguments: Any, **options: Any) -> Arguments:
    """Arguments of a call, as they are written there."""
    return arguments, options


@dataclass(frozen=True)
class EachMethod:
    """A routine.

    Attributes:
        routine: its name.
        families: whose methods it measures.
        inputs: makes what `cases` draw from, of quick runs or whole ones; `size` says its size in words, `places` how
            many rows or places it has.
        cases: arguments of each method by its name.
        plain: the same in torch: takes the arguments and returns a call.
        calls: what is measured besides the families' methods, and what is called in place of the registry's function,
            where that is a class say; `None` is the registry's function, of a method of another family.
    """

    routine: str
    families: tuple[str, ...]
    inputs: Callable[[bool], Any]
    cases: Mapping[str, Callable[[Any], Arguments]]
    plain: Mapping[str, Callable[..., Call]]
    calls: Mapping[str, Callable[..., Any] | None] = field(default_factory=dict)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the routine's options to `parser`."""
        parser.add_argument("--only", default="", metavar="A,B", help="methods whose name contains one of these")

    def measure(self, bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
        """Every method that is not in the file yet."""
        kept = Kept(bench, args, self.routine, ("quick",), _result)
        parts = args.only.split(",")
        every = self.functions()
        names = [name for name in every if any(part in name for part in parts)]
        if not names:
            raise ValueError(f"--only: got {args.only!r}, expected part of one of {', '.join(every)}")
        for name in names:
            for threads in bench.each_threads():
                if not kept.has(threads=threads, name=name):
                    bench.say(f"{self.routine} {name}")
                    kept.keep(*self._case(bench, name, every[name], threads))
        return _result(kept.rows)

    def functions(self) -> dict[str, Callable[..., Any]]:
        """What is measured, by name: the families' methods in the registry's order, then the others."""
        every = {method.name: method.function for method in methods()}
        own = [method.name for family in self.families for method in methods(family)]
        return {name: self.calls.get(name) or every[name] for name in dict.fromkeys([*own, *self.calls])}

    def _case(self, bench: Bench, name: str, function: Callable[..., Any], threads: int) -> list[Row]:
        inputs = self.inputs(bench.quick)
        arguments, options = self.cases[name](inputs)
        ours = f"longattn {name}"
        candidates = [Candidate(ours, lambda: function(*arguments, **options), peer=False)]
        if bench.peers and name in self.plain:
            candidates.append(Candidate(PEER, self.plain[name](*arguments, **options)))
        outcomes = bench.interleave(candidates)
        case = {"threads": threads, "name": name, "keys": inputs.places, "size": inputs.size}
        rows = rows_of(outcomes, ours, case)
        for row in rows:
            row["error"] = None
            if row["method"] == PEER and row["ms"] is not None:
                exact = outcomes[ours].result
                first = peers.to_numpy(exact[0] if isinstance(exact, tuple) else exact)
                row["error"] = float(np.abs(peers.to_numpy(outcomes[PEER].result).reshape(first.shape) - first).max())
        return rows

    def panels(self, result: Result) -> list[Panel | Bars]:
        """Torch's time as a multiple of ours, a panel per thread count."""
        rows = [row for row in result["rows"] if row["method"] == PEER and row["times_ours"]]
        drawn: list[Panel | Bars] = []
        for threads in dict.fromkeys(row["threads"] for row in rows):
            mine = {row["name"]: row["times_ours"] for row in rows if row["threads"] == threads}
            title = f"{self.routine}, {count(threads)}: plain torch's time as a multiple of ours"
            drawn.append(Bars(title, "ratio", tuple(mine), {PEER: tuple(mine.values())}, limit=1))
        return drawn

    def tables(self, found: Sequence[Result]) -> list[str]:
        """A table per thread count."""
        rows = all_rows(found, self.routine)
        lines: list[str] = []
        for threads in values_of(rows, "threads"):
            lines += titled(threads, table([row for row in rows if row["threads"] == threads], COLUMNS[1:]))
        return lines


def _result(rows: Sequence[Row]) -> dict[str, Any]:
    return {"rows": list(rows), "slopes": []}
