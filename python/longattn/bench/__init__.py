"""`longattn bench ROUTINE`: longattn beside torch and the machine's limits, interleaved in one process.

`harness` times, `peers` are torch's ways to the same result, `quality` is exact attention and what retrieval
keeps of it; one module per routine. `suite` runs the routines and keeps their JSON, `report` makes tables,
plots and verdicts of it, `targets` has the thresholds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import longattn as la
from longattn.bench import (
    capture,
    compare,
    decode,
    drift,
    error,
    global_linear,
    gpu,
    growth,
    linear,
    neighbourhood,
    options,
    prefill,
    report,
    results,
    retrieval,
    scan,
    sparse,
    suite,
    verified,
)
from longattn.bench.harness import Bench
from longattn.bench.plots import Bars, Panel, Scatter, draw, need_matplotlib
from longattn.bench.tables import Column, as_text

__all__ = ["add_arguments", "run"]


class Routine(Protocol):
    """A module with one benchmark."""

    SUMMARY: str
    COLUMNS: tuple[Column, ...]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the routine's own options."""
        ...

    def measure(self, bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
        """Runs it: `rows` (a table), `slopes`, and whatever else belongs into the result."""
        ...

    def panels(self, result: results.Result) -> Sequence[Panel | Bars | Scatter]:
        """What to draw of the result."""
        ...


ROUTINES: dict[str, Routine] = {
    "decode": decode,
    "prefill": prefill,
    "neighbourhood": neighbourhood,
    "sparse": sparse,
    "capture": capture,
    "retrieval": retrieval,
    "compare": compare,
    "verified": verified,
    "drift": drift,
    "growth": growth,
    "error": error,
    "scan": scan,
    "gpu": gpu,
    "linear": linear,
    "global-linear": global_linear,
}
TOOLS = {"suite": suite, "report": report}


class Shortcut:
    """A routine as a command of its own: `longattn compare` is `longattn bench compare`."""

    def __init__(self, routine: str) -> None:
        self.routine = routine

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the routine's options."""
        _add_routine(parser, ROUTINES[self.routine])

    def run(self, args: argparse.Namespace) -> int:
        """Runs it; status as of `longattn bench`."""
        args.routine = self.routine
        return run(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand per routine, and those that run or present them all, to `parser`."""
    routines = parser.add_subparsers(dest="routine", required=True, metavar="ROUTINE")
    for name, routine in ROUTINES.items():
        _add_routine(routines.add_parser(name, help=routine.SUMMARY, description=routine.SUMMARY), routine)
    for name, tool in TOOLS.items():
        tool.add_arguments(routines.add_parser(name, help=tool.SUMMARY, description=tool.SUMMARY))


def _add_routine(parser: argparse.ArgumentParser, routine: Routine) -> None:
    routine.add_arguments(parser)
    options.add_common(parser)
    options.add_own(parser)


def run(args: argparse.Namespace) -> int:
    """Runs one of them; status 0, 2 for bad options or missing parts, 130 after Ctrl-C."""
    threads = la.get_num_threads()
    try:
        if args.routine in TOOLS:
            status: int = TOOLS[args.routine].run(args)
            return status
        return _measure(args)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as problem:
        print(f"longattn bench {args.routine}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nlongattn bench {args.routine}: stopped", file=sys.stderr)
        return 130
    finally:
        la.set_num_threads(threads)


def _measure(args: argparse.Namespace) -> int:
    """Runs a routine, prints its table, writes and draws what is asked for."""
    routine = ROUTINES[args.routine]
    if args.plot:
        need_matplotlib("--plot")
    bench = Bench(
        threads=args.threads,
        rounds=args.rounds,
        budget_s=args.budget,
        quick=args.quick,
        peers=not args.no_peers,
    )
    command = " ".join(["longattn", *sys.argv[1:]])
    result = bench.describe(args.routine, command, vars(args)) | routine.measure(bench, args)
    result |= {"limits": bench.limits(), "notes": bench.notes}
    print(as_text(result, routine.COLUMNS))
    if args.json:
        results.write(result, args.json)
    if args.plot:
        draw(routine.panels(result), args.plot)
    return 0
