"""Causal attention of a whole sequence: bound by arithmetic.

GFLOP/s counts the causal half, 4 H D N (N + 1) / 2.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import longattn as la
from longattn.bench import memory, peers
from longattn.bench.arrays import DTYPES, gaussian
from longattn.bench.harness import Bench, Candidate, rows_of, slopes
from longattn.bench.options import Grid, add_grid, chosen_grid
from longattn.bench.plots import Bars, Panel, Scatter, series
from longattn.bench.results import Result, Row
from longattn.bench.sections import (
    Figures,
    Section,
    all_rows,
    by_lengths,
    grouped,
    number,
    short,
    slope_of,
    titled,
    values_of,
)
from longattn.bench.tables import Column, count, grid
from longattn.bench.targets import HALF, VNNI, Target

SUMMARY = "causal attention of a whole sequence, against torch's fused kernel; its memory beyond inputs and outputs"
OURS = "longattn.attention"
INT8_SCORES = "longattn.attention, int8 scores"
TORCH = "torch SDPA"
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("H", "query_heads"),
    Column("D", "head_dim"),
    Column("length", "keys"),
    Column("dtype", "dtype"),
    Column("method", "method"),
    Column("ms", "ms", ".4g"),
    Column("min", "ms_min", ".4g"),
    Column("max", "ms_max", ".4g"),
    Column("calls", "calls"),
    Column("GFLOP/s", "gflop_s", ".3g"),
    Column("of FMA", "of_fma", ".0%"),
    Column("× ours", "times_ours", ".2f"),
    Column("vs torch", "vs_torch", ".2f"),
    Column("vs own", "vs_own", ".2f"),
    Column("extra MB", "extra_mb", ".2f"),
)
GRID = Grid(heads=((8, 8),), head_dims=(64, 128), keys=(1024, 4096, 16384), dtypes=tuple(DTYPES))
QUICK_GRID = Grid(heads=((2, 2),), head_dims=(64,), keys=(128, 256), dtypes=tuple(DTYPES))
LINE = ("method", "head_dim", "dtype", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    add_grid(parser, GRID, heads=False)
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All shapes; rows, growth exponents of time and of memory beyond inputs and outputs."""
    grid = chosen_grid(args, GRID, QUICK_GRID)
    with_memory = not args.no_memory
    if with_memory and not memory.supported():
        with_memory = False
        bench.notes.append("memory not measured: it needs Linux's /proc/self/clear_refs")
    if not has_int8_scores():
        bench.notes.append("int8 scores left out: this build's attention has no qk_int8")
    rows: list[Row] = []
    for (heads, _), dim, dtype, length in itertools.product(grid.heads, grid.head_dims, grid.dtypes, grid.keys):
        rows += _case(bench, heads, dim, length, dtype, with_memory)
    return {
        "rows": rows,
        "slopes": slopes(rows, LINE),
        "memory_slopes": slopes(rows, LINE, "extra_mb"),
    }


def has_int8_scores() -> bool:
    """Whether this build can multiply queries and keys as int8."""
    return "qk_int8" in inspect.signature(la.attention).parameters


def _case(bench: Bench, heads: int, dim: int, length: int, dtype: str, with_memory: bool) -> list[Row]:
    rng = np.random.default_rng(0)
    q, k, v = (gaussian(rng, (1, heads, length, dim), DTYPES[dtype]) for _ in "qkv")
    bench.say(f"prefill {heads} x {dim}, length {length}, {dtype}")
    candidates = [Candidate(OURS, lambda: la.attention(q, k, v, causal=True), peer=False)]
    if has_int8_scores():
        int8: dict[str, Any] = {"qk_int8": True}
        candidates.append(Candidate(INT8_SCORES, lambda: la.attention(q, k, v, causal=True, **int8), peer=False))
    if bench.peers:
        candidates += peers.prefill(q, k, v)
    rows: list[Row] = []
    for threads in bench.each_threads():
        before = bench.fma_gflop_s()
        outcomes = bench.interleave(candidates)
        peak = (before + bench.fma_gflop_s()) / 2
        case = {"threads": threads, "query_heads": heads, "head_dim": dim, "keys": length, "dtype": dtype}
        found = rows_of(outcomes, OURS, case)
        torch = outcomes.get(TORCH)
        for row in found:
            if row["ms"] is None:
                continue
            row["gflop_s"] = 4 * heads * dim * length * (length + 1) / 2 / row["ms"] / 1e6
            row["of_fma"] = row["gflop_s"] / peak
            if row["ours"] and torch and not torch.failure:
                row["vs_torch"] = torch.median_ms / row["ms"]
            if row["method"] == INT8_SCORES:
                row["vs_own"] = 1 / row["times_ours"]
            if row["method"] == OURS and with_memory:
                makes = f"{__name__}:calls_for_memory"
                row["extra_mb"] = memory.extra_bytes(makes, (heads, dim, length, dtype), threads) / 1e6
        rows += found
    return rows


def calls_for_memory(heads: int, dim: int, length: int, dtype: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A call over a few rows and the one whose memory is measured, for `memory.of_call`."""
    q, k, v = (gaussian(np.random.default_rng(0), (1, heads, length, dim), DTYPES[dtype]) for _ in "qkv")
    out = np.ones_like(v)
    few = (slice(None), slice(None), slice(0, 16))
    return (
        lambda: la.attention(q[few], k[few], v[few], causal=True),
        lambda: la.attention(q, k, v, causal=True, out=out),
    )


def panels(result: Result) -> list[Panel | Bars]:
    """GFLOP/s over length, a panel per head_dim, dtype and thread count."""
    groups = grouped(result["rows"], "head_dim", "dtype", "threads")
    return [
        Panel(
            f"causal prefill, D {dim}, {dtype}, {count(threads)}",
            "length",
            "GFLOP/s",
            series(mine, "keys", "gflop_s"),
            log_y=False,
        )
        for (dim, dtype, threads), mine in groups.items()
    ]


def _tables(found: Sequence[Result]) -> list[str]:
    rows = [row for row in all_rows(found, "prefill") if row["ours"]]
    grown = all_rows(found, "prefill", "slopes")
    memory = all_rows(found, "prefill", "memory_slopes")
    lengths = values_of(rows, "keys")
    heads = ["D", "dtype", *(f"{short(n)}: ms (of FMA)" for n in lengths), "slope"]
    heads += [*(f"{short(n)}: × torch" for n in lengths), *(f"{short(n)}: extra MB" for n in lengths), "its slope"]
    lines: list[str] = []
    for threads in values_of(rows, "threads"):
        cells = []
        mine = [row for row in rows if row["threads"] == threads]
        for by_length in by_lengths(mine, ("method", "head_dim", "dtype")).values():
            some = next(iter(by_length.values()))
            kind = some["dtype"] + (", int8 scores" if some["method"] == INT8_SCORES else "")
            measured = [by_length.get(n, {}) for n in lengths]
            cells.append(
                [str(some["head_dim"]), kind]
                + [f"{row['ms']:.4g} ({row['of_fma']:.0%})" if row else "" for row in measured]
                + [slope_of(grown, LINE, some)]
                + [number(row.get("vs_torch"), ".2f") for row in measured]
                + [number(row.get("extra_mb"), ".2f") for row in measured]
                + [slope_of(memory, LINE, some)]
            )
        lines += titled(threads, grid(heads, cells))
    return lines


def _lines(rows: Sequence[Row]) -> list[Panel | Bars | Scatter]:
    """Share of the multiply-add peak over length per dtype; then memory over length."""
    ours = [
        {**row, "percent": 100 * row["of_fma"], "line": row["dtype"] + row["method"].removeprefix(OURS)}
        for row in rows
        if row["ours"]
    ]
    panels: list[Panel | Bars | Scatter] = []
    for threads in values_of(ours, "threads"):
        for dim in values_of(ours, "head_dim"):
            mine = [row for row in ours if (row["threads"], row["head_dim"]) == (threads, dim)]
            title = f"causal prefill, D {dim}, {count(threads)}"
            lines = series(mine, "keys", "percent", by="line")
            panels.append(Panel(title, "length", "% of multiply-add peak", lines, log_y=False, limit=100))
    most = max(values_of(ours, "threads"))
    extra = [{**row, "line": f"D {row['head_dim']}, {row['dtype']}"} for row in ours if row["threads"] == most]
    lines = series(extra, "keys", "extra_mb", by="line")
    if lines:
        panels.append(Panel(f"memory beyond inputs and outputs, {count(most)}", "length", "MB", lines))
    return panels


def _ratios(rows: Sequence[Row]) -> list[Panel | Bars | Scatter]:
    """Speed against torch, a group of bars per length, a panel per width and thread count."""
    ours = [row for row in rows if row["method"] == OURS]
    panels: list[Panel | Bars | Scatter] = []
    for threads in values_of(ours, "threads"):
        for dim in values_of(ours, "head_dim"):
            mine = [row for row in ours if (row["threads"], row["head_dim"]) == (threads, dim)]
            found = {(row["dtype"], row["keys"]): row.get("vs_torch") for row in mine}
            lengths = values_of(mine, "keys")
            bars = {
                dtype: tuple(found.get((dtype, n)) for n in lengths)
                for dtype in dict.fromkeys(row["dtype"] for row in mine)
            }
            title = f"D {dim}, {count(threads)}: times as fast as {TORCH}"
            panels.append(Bars(title, "ratio", tuple(map(short, lengths)), bars, limit=1))
    return panels


def _targets() -> list[Target]:
    command = "longattn bench prefill --threads 1,2"
    infinity = float("inf")
    found = [
        Target(
            "prefill, float32: share of the multiply-add peak, N ≥ 4K",
            "prefill",
            "of_fma",
            0.6,
            command,
            {"method": (OURS,), "dtype": ("float32",)},
            {"keys": (4096, infinity)},
            form=".0%",
        )
    ]
    for dtype in ("float32", *HALF):
        for what, dims, keys, bound in (
            ("D 128, N ≥ 4K", (128,), (4096, infinity), 1.2),
            ("D 64", (64,), (0, infinity), 1.5),
            ("N = 1K", (64, 128), (1024, 1024), 1.5),
        ):
            found.append(
                Target(
                    f"prefill, {dtype}, {what}: speed against {TORCH}",
                    "prefill",
                    "vs_torch",
                    bound,
                    command,
                    {"method": (OURS,), "dtype": (dtype,), "head_dim": dims},
                    {"keys": keys},
                )
            )
    found.append(
        Target(
            "prefill, float32, int8 scores: speed against our own float32, where the CPU has VNNI",
            "prefill",
            "vs_own",
            1.3,
            command,
            {"method": (INT8_SCORES,), "dtype": ("float32",)},
            needs=VNNI,
        )
    )
    found.append(
        Target(
            "prefill: memory beyond inputs and outputs grows as length to the power",
            "prefill",
            "slope",
            1.1,
            command,
            {"method": (OURS,)},
            table="memory_slopes",
            at_most=True,
        )
    )
    return found


def _figures(found: Sequence[Result]) -> Figures:
    rows = all_rows(found, "prefill")
    drawn = {"prefill": _lines(rows)} if rows else {}
    if any(row.get("vs_torch") for row in rows):
        drawn["prefill-ratios"] = _ratios(rows)
    return drawn


SECTIONS = (
    Section(
        "dense",
        "prefill",
        "Prefill: causal attention of a whole sequence",
        "8 heads. `of FMA`: causal half of the arithmetic as a share of the multiply-add peak. `× torch`: speed "
        "against torch's fused kernel. `extra MB`: peak memory beyond inputs and outputs, and the slope of its growth.",
        _tables,
        _figures,
    ),
)
TARGETS = tuple(_targets())
