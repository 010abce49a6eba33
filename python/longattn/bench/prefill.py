"""Causal attention of a whole sequence: bound by arithmetic.

GFLOP/s counts the causal half, 4 H D N (N + 1) / 2.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np

import longattn as la
from longattn.bench import peers
from longattn.bench.harness import DTYPES, Bench, Candidate, dtypes, gaussian, integers, rows_of, slopes
from longattn.bench.report import Column, Panel, series

SUMMARY = "causal attention of a whole sequence, against torch's fused kernel"
OURS = "longattn.attention"
COLUMNS: tuple[Column, ...] = (
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
)
HEADS, HEAD_DIMS, LENGTHS = 8, (128, 64), (1024, 4096, 16384)
QUICK_HEADS, QUICK_HEAD_DIMS, QUICK_LENGTHS = 2, (64,), (128, 256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument("--lengths", type=integers, help="comma-separated (default 1024,4096,16384)")
    parser.add_argument("--head-dims", type=integers, help="comma-separated (default 128,64)")
    parser.add_argument("--dtypes", type=dtypes, default=list(DTYPES), help="comma-separated (default: all three)")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All shapes; rows and growth exponents."""
    heads = QUICK_HEADS if bench.quick else HEADS
    dims = args.head_dims or (QUICK_HEAD_DIMS if bench.quick else HEAD_DIMS)
    lengths = args.lengths or (QUICK_LENGTHS if bench.quick else LENGTHS)
    shapes = itertools.product(dims, args.dtypes, lengths)
    rows = [row for dim, dtype, length in shapes for row in _case(bench, heads, dim, length, dtype)]
    return {
        "rows": rows,
        "slopes": slopes(rows, lambda row: f"{row['method']}, D {row['head_dim']}, {row['dtype']}"),
    }


def _case(bench: Bench, heads: int, dim: int, length: int, dtype: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    q, k, v = (gaussian(rng, (1, heads, length, dim), DTYPES[dtype]) for _ in "qkv")
    bench.say(f"prefill {heads} x {dim}, length {length}, {dtype}")
    candidates = [Candidate(OURS, lambda: la.attention(q, k, v, causal=True), peer=False)]
    if bench.peers:
        candidates += peers.prefill(q, k, v)
    before = bench.fma_gflop_s()
    outcomes = bench.interleave(candidates)
    peak = (before + bench.fma_gflop_s()) / 2
    rows = rows_of(outcomes, OURS, {"query_heads": heads, "head_dim": dim, "keys": length, "dtype": dtype})
    for row in rows:
        if row["ms"] is not None:
            row["gflop_s"] = 4 * heads * dim * length * (length + 1) / 2 / row["ms"] / 1e6
            row["of_fma"] = row["gflop_s"] / peak
    return rows


def panels(result: dict[str, Any]) -> list[Panel]:
    """GFLOP/s over length, a panel per head_dim and dtype."""
    kinds = list(dict.fromkeys((row["head_dim"], row["dtype"]) for row in result["rows"]))
    return [
        Panel(
            f"causal prefill, D {dim}, {dtype}",
            "length",
            "GFLOP/s",
            series(
                [row for row in result["rows"] if (row["head_dim"], row["dtype"]) == (dim, dtype)],
                "keys",
                "gflop_s",
            ),
            log_y=False,
        )
        for dim, dtype in kinds
    ]
