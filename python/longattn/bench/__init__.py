"""`longattn bench ROUTINE`: longattn beside torch and the machine's limits, interleaved in one process.

`harness` times, `peers` are torch's ways to the same result, `quality` is exact attention and what retrieval
keeps of it; one module per routine, with its sections of the report and its targets, found by `registry`.
`suite` runs the routines and keeps their JSON, `report` makes tables, plots and verdicts of it.
"""

from __future__ import annotations

import argparse
import shlex
import sys

import longattn as la
from longattn.bench import options, registry, results
from longattn.bench.harness import Bench
from longattn.bench.plots import draw, need_matplotlib
from longattn.bench.registry import Routine
from longattn.bench.tables import as_text

__all__ = ["add_arguments", "run"]


class Shortcut:
    """A routine as a command of its own: `longattn compare` is `longattn bench compare`."""

    def __init__(self, routine: str) -> None:
        self.routine = routine

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the routine's options."""
        _add_routine(parser, registry.routines()[self.routine])

    def run(self, args: argparse.Namespace) -> int:
        """Runs it; status as of `longattn bench`."""
        args.routine = self.routine
        return run(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand per routine, and those that run or present them all, to `parser`."""
    routines = parser.add_subparsers(dest="routine", required=True, metavar="ROUTINE")
    for name, routine in registry.routines().items():
        _add_routine(routines.add_parser(name, help=routine.SUMMARY, description=routine.SUMMARY), routine)
    for name, tool in registry.tools().items():
        tool.add_arguments(routines.add_parser(name, help=tool.SUMMARY, description=tool.SUMMARY))


def _add_routine(parser: argparse.ArgumentParser, routine: Routine) -> None:
    routine.add_arguments(parser)
    options.add_common(parser)
    options.add_own(parser)


def run(args: argparse.Namespace) -> int:
    """Runs one of them; status 0, 2 for bad options or missing parts, 130 after Ctrl-C."""
    threads = la.get_num_threads()
    tools = registry.tools()
    try:
        if args.routine in tools:
            return tools[args.routine].run(args)
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
    routine = registry.routines()[args.routine]
    if args.plot:
        need_matplotlib("--plot")
    bench = Bench(
        threads=args.threads,
        rounds=args.rounds,
        budget_s=args.budget,
        quick=args.quick,
        peers=not args.no_peers,
    )
    command = shlex.join(["longattn", *sys.argv[1:]])
    result = bench.describe(args.routine, command, vars(args)) | routine.measure(bench, args)
    result |= {"limits": bench.limits(), "notes": bench.notes}
    print(as_text(result, routine.COLUMNS, registry.summary(routine, result)))
    if args.json:
        results.write(result, args.json)
    if args.plot:
        draw(routine.panels(result), args.plot)
    return 0
