"""The command `longattn`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

import longattn
from longattn import bench, catalogue, demo, doctor
from longattn.vectors import command as vectors


class Command(Protocol):
    """A module that is a subcommand."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; exit status 0, 2 for bad options or a missing part, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="longattn", description="Attention over long contexts in host memory.")
    parser.add_argument("--version", action="version", version=f"longattn {longattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _commands().items():
        sub = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


def _commands() -> dict[str, tuple[Command, str]]:
    return {
        "demo": (
            demo,
            "a small language model finds facts in a long text while reading a few per cent of its keys",
        ),
        "bench": (bench, "time longattn beside the machine's limits and torch"),
        "compare": (bench.Shortcut("compare"), bench.registry.routines()["compare"].SUMMARY),
        "doctor": (
            doctor,
            "what this machine offers, what longattn uses of it, what to do about the difference",
        ),
        "methods": (catalogue, "what methods there are, what each supports and costs"),
        "vectors": (vectors, "make and cache the recorded queries, keys and values that benchmarks use"),
    }


if __name__ == "__main__":
    sys.exit(main())
