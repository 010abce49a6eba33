"""`longattn bench ROUTINE`: longattn beside torch and the machine's limits, interleaved in one process.

`harness` times, `peers` are torch's ways to the same result, `quality` is exact attention and what retrieval
keeps of it, `report` writes; one module per routine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Protocol

from longattn.bench import decode, prefill, report, retrieval
from longattn.bench.harness import Bench

__all__ = ["add_arguments", "run"]


class Routine(Protocol):
    """A module with one benchmark."""

    SUMMARY: str
    COLUMNS: tuple[report.Column, ...]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the routine's own options."""
        ...

    def measure(self, bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
        """Runs it: `rows` (a table), and whatever else belongs into the result."""
        ...

    def panels(self, result: dict[str, Any]) -> list[report.Panel]:
        """What to draw of the result."""
        ...


ROUTINES: dict[str, Routine] = {"decode": decode, "prefill": prefill, "retrieval": retrieval}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand per routine to `parser`."""
    routines = parser.add_subparsers(dest="routine", required=True, metavar="ROUTINE")
    for name, routine in ROUTINES.items():
        sub = routines.add_parser(name, help=routine.SUMMARY, description=routine.SUMMARY)
        routine.add_arguments(sub)
        sub.add_argument("--threads", type=int, help="threads of longattn and torch (default: longattn's)")
        sub.add_argument("--rounds", type=int, default=5, help="timed calls of each (default %(default)s)")
        sub.add_argument(
            "--budget",
            type=float,
            default=8.0,
            help="seconds; a slower peer is called once (default %(default)s)",
        )
        sub.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
        sub.add_argument("--no-peers", action="store_true", help="longattn alone")
        sub.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions, settings and rows there")
        sub.add_argument("--plot", type=Path, metavar="FILE", help="draw the result there (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Runs a routine, prints its table; status 0, 2 for bad options or missing parts, 130 after Ctrl-C."""
    routine = ROUTINES[args.routine]
    try:
        if args.plot:
            report.need_matplotlib()
        bench = Bench(
            threads=args.threads,
            rounds=args.rounds,
            budget_s=args.budget,
            quick=args.quick,
            peers=not args.no_peers,
        )
        result = bench.describe(args.routine, vars(args)) | routine.measure(bench, args)
        result |= {"limits": bench.limits(), "notes": bench.notes}
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"longattn bench {args.routine}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nlongattn bench {args.routine}: stopped", file=sys.stderr)
        return 130
    print(report.as_text(result, routine.COLUMNS))
    if args.json:
        report.write(result, args.json)
    if args.plot:
        report.plot(routine.panels(result), args.plot)
    return 0
