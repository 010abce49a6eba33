"""Options that the routines share: one spelling, one default, one check each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Grid:
    """Shapes of a run: every combination of these.

    Attributes:
        heads: pairs of query and KV heads.
        head_dims: widths of a row.
        keys: lengths.
        dtypes: names of storage dtypes.
    """

    heads: tuple[tuple[int, int], ...]
    head_dims: tuple[int, ...]
    keys: tuple[int, ...]
    dtypes: tuple[str, ...]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds what every routine understands."""
    parser.add_argument(
        "--threads",
        type=integers,
        metavar="N,N",
        help="thread counts of longattn and its peers, each measured in turn (default: longattn's setting)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each candidate (default %(default)s)")
    parser.add_argument(
        "--budget",
        type=float,
        default=4.0,
        help="seconds of timed calls per peer and case; a slow peer is called less often (default %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions, settings and rows there")


def add_own(parser: argparse.ArgumentParser) -> None:
    """Adds what the routines of the package understand, and scripts around another peer do not."""
    parser.add_argument("--no-peers", action="store_true", help="longattn alone")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result there (needs matplotlib)")


def add_grid(parser: argparse.ArgumentParser, default: Grid, *, heads: bool) -> None:
    """Adds the options that replace parts of `default`; `--heads` if asked for."""
    if heads:
        parser.add_argument(
            "--heads",
            type=head_pairs,
            metavar="HQ/HKV,...",
            help=f"query and KV heads (default {','.join(f'{hq}/{hkv}' for hq, hkv in default.heads)})",
        )
    for option, values in (("--head-dims", default.head_dims), ("--keys", default.keys)):
        parser.add_argument(
            option,
            type=integers,
            metavar="N,N",
            help=f"comma-separated (default {','.join(str(value) for value in values)})",
        )
    parser.add_argument(
        "--dtypes",
        type=names(default.dtypes),
        metavar="NAME,...",
        help=f"comma-separated (default {','.join(default.dtypes)})",
    )


def chosen_grid(args: argparse.Namespace, default: Grid, quick: Grid) -> Grid:
    """The default grid, or the quick one, with what the options replace."""
    base = quick if args.quick else default
    parts = {field.name: getattr(args, field.name, None) or getattr(base, field.name) for field in fields(Grid)}
    return Grid(**{name: tuple(part) for name, part in parts.items()})


def integers(text: str) -> list[int]:
    """Argument type: `1024,4096`, all at least 1."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected integers of at least 1, comma-separated, got {text}")
    return values


def head_pairs(text: str) -> list[tuple[int, int]]:
    """Argument type: `32/8,64/8`, query heads a multiple of the KV heads."""
    pairs = []
    for part in text.split(","):
        query, _, kv = part.partition("/")
        if not (query.isdecimal() and kv.isdecimal() and int(kv) and int(query) and int(query) % int(kv) == 0):
            raise argparse.ArgumentTypeError(
                f"expected pairs like 32/8, the first a multiple of the second, got {part}"
            )
        pairs.append((int(query), int(kv)))
    return pairs


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Argument type: some of `known`, comma-separated."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")
        return chosen

    return parse
