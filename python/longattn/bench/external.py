"""Decode beside a peer that is no part of the package: what its script shares with the other scripts.

A script gives a name, a version and a function from a case to the peer's ways; the rest (options, arrays,
turns, figures, JSON) is here.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longattn.bench import decode, results, tables
from longattn.bench.harness import Bench, slopes
from longattn.bench.options import Grid, add_common, add_grid, chosen_grid
from longattn.bench.plots import Bars, Panel, Scatter
from longattn.bench.results import Result, Row
from longattn.bench.sections import Figures, Section, all_rows, by_threads, grouped, short, values_of
from longattn.bench.tables import count
from longattn.bench.targets import GQA, MHA, Target

ROUTINE = "decode-peer"
QUICK_GRID = Grid(heads=((8, 2),), head_dims=(64,), keys=(256, 1024), dtypes=("float32", "float16"))
Ways = Callable[[decode.Case, int, Sequence[str]], list[decode.Way]]
"""A case, a thread count and the dtypes asked for to the peer's ways."""


def parser_of(peer: str, grid: Grid) -> argparse.ArgumentParser:
    """The options of a script."""
    parser = argparse.ArgumentParser(description=f"A decode step of longattn beside {peer}, in turns in one process.")
    add_common(parser)
    add_grid(parser, grid, heads=True)
    return parser


def main(peer: str, grid: Grid, load: Callable[[], tuple[str, Ways]], argv: Sequence[str] | None = None) -> int:
    """Runs a script: measures, prints the table, writes the JSON.

    Args:
        peer: the peer's name, which its candidates' names begin with.
        grid: what to measure by default.
        load: imports the peer and returns its version and its ways; raises `ModuleNotFoundError` or `OSError`,
            with a message that says what to do, where it is not installed.
        argv: arguments; None is the command line's.

    Returns:
        Exit status: 0, or 2 for bad options or a peer that is not there, 130 after Ctrl-C.
    """
    args = parser_of(peer, grid).parse_args(argv)

    def measure(bench: Bench) -> dict[str, Any]:
        version, ways = load()
        chosen = chosen_grid(args, grid, QUICK_GRID)
        rows: list[Row] = []
        for case, ours in decode.sweep(bench, chosen):
            for threads in bench.each_threads():
                found = decode.measure_case(bench, case, ours, ways(case, threads, chosen.dtypes))
                rows += [row if row["ours"] else {**row, "peer": peer} for row in found]
            del case, ours
        bench.notes.append(f"{peer} {version}")
        return {"peer": peer, "version": version, "rows": rows, "slopes": slopes(rows, decode.LINE)}

    return run_script(peer, args, argv, ROUTINE, decode.COLUMNS, measure)


def run_script(
    name: str,
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    routine: str,
    columns: Sequence[tables.Column],
    measure: Callable[[Bench], dict[str, Any]],
) -> int:
    """Measures, prints the table and writes the JSON; status 0, 2 for what is missing or bad, 130 after Ctrl-C.

    Args:
        name: what messages begin with.
        args: parsed options, those of `add_common` among them.
        argv: what they were parsed from; `None` is the command line.
        routine: what the result calls itself.
        columns: of the table.
        measure: gives `rows`, `slopes` and whatever else belongs into the result.
    """
    try:
        bench = Bench(threads=args.threads, rounds=args.rounds, budget_s=args.budget, quick=args.quick, peers=False)
        found = measure(bench)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)
        return 130
    command = shlex.join(["python", Path(sys.argv[0]).as_posix(), *(sys.argv[1:] if argv is None else argv)])
    result = bench.describe(routine, command, vars(args)) | found | {"limits": bench.limits(), "notes": bench.notes}
    print(tables.as_text(result, columns))
    if args.json:
        results.write(result, args.json)
    return 0


def _tables(found: Sequence[Result]) -> list[str]:
    return by_threads(all_rows(found, ROUTINE), decode.COLUMNS[1:])


def _ratios(rows: Sequence[Row]) -> list[Panel | Bars | Scatter]:
    """How many times as long the peers take, a panel per shape and thread count."""
    theirs = [row for row in rows if row.get("peer") and row["times_ours"] is not None]
    panels: list[Panel | Bars | Scatter] = []
    for (heads, dim, threads), mine in grouped(theirs, "heads", "head_dim", "threads").items():
        lengths = values_of(mine, "keys")
        found = {(row["method"], row["keys"]): row["times_ours"] for row in mine}
        bars = {
            method: tuple(found.get((method, n)) for n in lengths)
            for method in dict.fromkeys(row["method"] for row in mine)
        }
        title = f"decode {heads} x {dim}, {count(threads)}: time as a multiple of ours"
        panels.append(Bars(title, "ratio", tuple(map(short, lengths)), bars, limit=1))
    return panels


def _figures(found: Sequence[Result]) -> Figures:
    rows = all_rows(found, ROUTINE)
    return {"peers": _ratios(rows)} if rows else {}


SECTIONS = (
    Section(
        "dense",
        "peers",
        "Decode beside other runtimes",
        "Made by the scripts in `benches/peers`; `× ours` is the peer's time over ours in the same bits per element.",
        _tables,
        _figures,
    ),
)
TARGETS = tuple(
    Target(
        f"{kind} decode: speed against {peer}",
        ROUTINE,
        "times_ours",
        2.0,
        f"python benches/peers/{script} --threads 1,2",
        {"peer": (peer,), "heads": heads},
    )
    for peer, script in (("onnxruntime", "onnxruntime_gqa.py"), ("ggml", "ggml_flash.py"))
    for kind, heads in (("GQA", GQA), ("MHA", MHA))
)
