"""Causal attention of a whole sequence: bound by arithmetic.

GFLOP/s counts the causal half, 4 H D N (N + 1) / 2.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
from typing import Any

import numpy as np

import longattn as la
from longattn.bench import memory, peers
from longattn.bench.arrays import DTYPES, gaussian
from longattn.bench.harness import Bench, Candidate, rows_of, slopes
from longattn.bench.options import Grid, add_grid, chosen_grid
from longattn.bench.plots import Bars, Panel, series
from longattn.bench.results import Result, Row
from longattn.bench.tables import Column, count

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
                row["extra_mb"] = memory.extra_bytes(heads, dim, length, dtype, threads) / 1e6
        rows += found
    return rows


def panels(result: Result) -> list[Panel | Bars]:
    """GFLOP/s over length, a panel per head_dim, dtype and thread count."""
    kinds = list(dict.fromkeys((row["head_dim"], row["dtype"], row["threads"]) for row in result["rows"]))
    return [
        Panel(
            f"causal prefill, D {dim}, {dtype}, {count(threads)}",
            "length",
            "GFLOP/s",
            series(
                [row for row in result["rows"] if (row["head_dim"], row["dtype"], row["threads"]) == kind],
                "keys",
                "gflop_s",
            ),
            log_y=False,
        )
        for kind in kinds
        for dim, dtype, threads in [kind]
    ]
