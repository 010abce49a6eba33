"""Recurrences of matrix states: prefill, bound by arithmetic, and decode steps, bound by reading and writing the state.

GFLOP/s counts, per row and head, `4 D^2` operations (read and update of the state), with the delta rule `6 D^2`, and
128 D (with the delta rule 320 D) for rows of a chunk of 64 with each other, however large the chunks really are.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from longattn.bench import linear_crossover, linear_growth, linear_peers
from longattn.bench.arrays import gaussian
from longattn.bench.harness import Bench, Candidate, rows_of
from longattn.bench.linear_forms import FORMS, Form
from longattn.bench.options import Grid, add_grid, chosen_grid
from longattn.bench.peers import to_numpy
from longattn.bench.plots import Bars, Panel
from longattn.bench.results import Result, Row
from longattn.bench.sections import Figures, Section, all_rows, titled, values_of
from longattn.bench.tables import Column, table
from longattn.bench.targets import Target

SUMMARY = "linear attention and recurrences: prefill and decode step, against torch's loops and our own attention"
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("form", "form"),
    Column("H", "query_heads"),
    Column("D", "head_dim"),
    Column("batch", "batch"),
    Column("length", "keys"),
    Column("dtype", "dtype"),
    Column("method", "method"),
    Column("ms", "ms", ".3g"),
    Column("min", "ms_min", ".3g"),
    Column("max", "ms_max", ".3g"),
    Column("calls", "calls"),
    Column("GFLOP/s", "gflop_s", ".3g"),
    Column("of FMA", "of_fma", ".0%"),
    Column("GB/s of state", "gb_s", ".3g"),
    Column("of read", "of_read", ".0%"),
    Column("× ours", "times_ours", ".2f"),
    Column("vs chunk loop", "vs_chunks", ".2f"),
    Column("vs transformers", "vs_transformers", ".2f"),
    Column("vs row loop", "vs_rows", ".1f"),
    Column("max difference", "difference", ".1e"),
)
GRID = Grid(heads=((8, 8),), head_dims=(128,), keys=(8192, 65536), dtypes=("float32", "bfloat16"))
QUICK_GRID = Grid(heads=((2, 2),), head_dims=(32,), keys=(128, 256), dtypes=("float32", "bfloat16"))
#: Sequences that decode at once: states of one fit the cache of a core, those of many do not.
BATCHES, QUICK_BATCHES = (1, 64), (1, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    add_grid(parser, GRID, heads=False)
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Prefill of the grid, decode steps, growth over the grid's lengths, and speed against attention by length."""
    grid = chosen_grid(args, GRID, QUICK_GRID)
    rows: list[Row] = []
    for (heads, _), dim, dtype, length in itertools.product(grid.heads, grid.head_dims, grid.dtypes, grid.keys):
        for form in FORMS:
            rows += _prefill(bench, form, heads, dim, length, dtype, length == min(grid.keys))
    heads, dim = grid.heads[0][0], grid.head_dims[0]
    for form, batch in itertools.product(FORMS, QUICK_BATCHES if bench.quick else BATCHES):
        rows += _step(bench, form, heads, dim, batch)
    grown = linear_growth.measure(bench, grid, not args.no_memory)
    return {"rows": rows, **grown, "crossover": linear_crossover.measure(bench, heads, dim)}


def _prefill(bench: Bench, form: Form, heads: int, dim: int, length: int, dtype: str, recurrent: bool) -> list[Row]:
    bench.say(f"linear {form.name} {heads} x {dim}, length {length}, {dtype}")
    arguments = form.arguments(np.random.default_rng(0), (1, heads, length, dim), dtype)
    ours = f"longattn.linear.{form.name}"
    candidates = [Candidate(ours, lambda: form.call(**arguments)[0], peer=False)]
    if bench.peers:
        candidates += linear_peers.ways(arguments, form.delta, recurrent)
    rows: list[Row] = []
    for threads in bench.each_threads():
        before = bench.fma_gflop_s()
        outcomes = bench.interleave(candidates)
        peak = (before + bench.fma_gflop_s()) / 2
        case = {"threads": threads, "form": form.name, "query_heads": heads, "head_dim": dim}
        found = rows_of(outcomes, ours, {**case, "batch": 1, "keys": length, "dtype": dtype})
        for row in found:
            if row["ms"] is None:
                continue
            row["gflop_s"] = form.flops(heads * length, dim) / row["ms"] / 1e6
            row["of_fma"] = row["gflop_s"] / peak
            if not row["ours"]:
                difference = to_numpy(outcomes[row["method"]].result) - to_numpy(outcomes[ours].result)
                row["difference"] = float(np.abs(difference).max())
        for figure, peer in (
            ("vs_chunks", linear_peers.CHUNKS),
            ("vs_transformers", linear_peers.TRANSFORMERS),
            ("vs_rows", linear_peers.RECURRENT),
        ):
            if peer in outcomes and not outcomes[peer].failure:
                found[0][figure] = outcomes[peer].median_ms / found[0]["ms"]
        rows += found
    return rows


def _step(bench: Bench, form: Form, heads: int, dim: int, batch: int) -> list[Row]:
    bench.say(f"linear {form.name} {heads} x {dim}, step of {batch}")
    rng = np.random.default_rng(0)
    arguments = form.arguments(rng, (batch, heads, 1, dim), "float32")
    state = gaussian(rng, (batch, heads, dim, dim), np.float32)
    out = np.empty((batch, heads, 1, dim), np.float32)
    repeats = max(1, 64 // batch)
    ours = f"longattn.linear.{form.name}, step"

    def steps() -> None:
        for _ in range(repeats):
            form.call(**arguments, initial_state=state, out_state=state, out=out)

    rows: list[Row] = []
    for threads in bench.each_threads():
        outcomes = bench.interleave([Candidate(ours, steps, peer=False)])
        case = {"threads": threads, "form": form.name, "query_heads": heads, "head_dim": dim, "batch": batch}
        (row,) = rows_of(outcomes, ours, {**case, "keys": 1, "dtype": "float32"})
        for figure in ("ms", "ms_min", "ms_max"):
            row[figure] /= repeats
        row["gb_s"] = 2 * state.nbytes / row["ms"] / 1e6
        row["of_read"] = row["gb_s"] / bench.recent_read_gb_s()
        rows.append(row)
    return rows


def summary(result: Result) -> list[str]:
    """Tables of growth and of the lengths from which on each form is faster than attention."""
    return [*linear_growth.lines(result["slopes"], result["memory"]), *linear_crossover.lines(result["crossover"])]


def panels(result: Result) -> list[Panel | Bars]:
    """Speed against attention over length."""
    return linear_crossover.panels(result["crossover"])


def _tables(found: Sequence[Result]) -> list[str]:
    rows = all_rows(found, "linear")
    lines: list[str] = []
    for threads in values_of(rows, "threads"):
        mine = [row for row in rows if row["threads"] == threads]
        for figure in ("gflop_s", "gb_s"):
            part = [row for row in mine if row.get(figure)]
            if part:
                lines += titled(threads, table(part, COLUMNS[1:]))
    return lines + linear_growth.lines(all_rows(found, "linear", "slopes"), all_rows(found, "linear", "memory"))


def _crossover_figures(found: Sequence[Result]) -> Figures:
    rows = all_rows(found, "linear", "crossover")
    return {"linear-crossover": linear_crossover.panels(rows)} if rows else {}


def _targets() -> list[Target]:
    plain, delta = ("linear_attention", "lightning_attention"), ("gated_delta_rule", "kimi_delta_attention")
    found = []
    for text, figure, bound, forms, form in (
        ("the row loop in torch", "vs_rows", 30, None, ".1f"),
        ("the chunk loop in torch, decays of heads", "vs_chunks", 2.5, plain, ".1f"),
        ("the chunk loop in torch, delta rule", "vs_chunks", 5, delta, ".1f"),
        ("transformers' fallback", "vs_transformers", 8, delta, ".1f"),
        ("the multiply-add peak, decays of heads", "of_fma", 0.5, plain, ".0%"),
        ("the multiply-add peak, delta rule", "of_fma", 0.35, delta, ".0%"),
        ("the read bandwidth, decode steps", "of_read", 0.7, None, ".0%"),
    ):
        what = "share of" if form == ".0%" else "speed against"
        where = {"ours": (True,)} | ({"form": forms} if forms else {})
        found.append(
            Target(f"recurrences: {what} {text}", "linear", figure, bound, "longattn bench linear", where, form=form)
        )
    for text, figure, bound, form in (
        ("time over length, exponent's distance from 1", "from_linear", 0.05, ".3f"),
        ("memory beside inputs and outputs, growth as a share of theirs", "memory_share", 0.01, ".2%"),
    ):
        found.append(
            Target(
                f"recurrences: {text}",
                "linear",
                figure,
                bound,
                "longattn bench linear",
                table="slopes",
                at_most=True,
                form=form,
            )
        )
    return found


SECTIONS = (
    Section(
        "linear",
        "linear",
        "Linear attention and recurrences",
        "States `[D, D]` of 8 heads. `of FMA`: arithmetic as a share of the multiply-add peak, rows of a chunk of 64 "
        "with each other counted whatever the chunk. Decode steps: bytes of the state read and written per second, as "
        "a share of the read bandwidth. Exponents: of time over length, lengths in turns, the median of the turns "
        "with the least and the greatest; memory is exact to about a megabyte.",
        _tables,
    ),
    Section(
        "linear",
        "linear-crossover",
        "Linear forms and attention: from which length on",
        "Time of causal `longattn.attention` over that of the form, same heads and rows, float32; and the length from "
        "which on the form is faster, between two lengths on straight lines of both logarithms.",
        lambda found: linear_crossover.lines(all_rows(found, "linear", "crossover")),
        _crossover_figures,
    ),
)

TARGETS = tuple(_targets())
