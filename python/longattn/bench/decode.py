"""One query row per head over a long cache: bound by reading keys and values once.

GB/s counts each K and V byte once, however often a candidate reads it.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import longattn as la
from longattn.bench import peers, quality
from longattn.bench.harness import DTYPES, Bench, Candidate, dtypes, gaussian, integers, rows_of, slopes
from longattn.bench.report import Column, Panel, series

SUMMARY = "one query row per head over a long cache, against every way torch has"
OURS = "longattn.attention"
HOPELESS = 20  # times the fastest peer: such a way is left out at longer lengths
COLUMNS: tuple[Column, ...] = (
    Column("Hq/Hkv", "heads"),
    Column("D", "head_dim"),
    Column("keys", "keys"),
    Column("dtype", "dtype"),
    Column("method", "method"),
    Column("ms", "ms", ".3g"),
    Column("min", "ms_min", ".3g"),
    Column("max", "ms_max", ".3g"),
    Column("calls", "calls"),
    Column("GB/s", "gb_s", ".2f"),
    Column("of read", "of_read", ".0%"),
    Column("× ours", "times_ours", ".2f"),
    Column("max error", "error", ".1e"),
)
Grid = tuple[tuple[tuple[int, int, int], tuple[int, ...]], ...]  # (query heads, KV heads, head_dim), lengths
GRID: Grid = (((32, 8, 128), (8192, 32768, 131072)), ((32, 32, 128), (32768,)))
QUICK_GRID: Grid = (((8, 2, 64), (256, 1024)), ((2, 2, 64), (256,)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument(
        "--keys",
        type=integers,
        help="lengths, comma-separated, in place of the grid's, for 32/8 heads of 128",
    )
    parser.add_argument("--dtypes", type=dtypes, default=list(DTYPES), help="comma-separated (default: all three)")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All cases of the grid; rows and the growth exponent of each method timed at several lengths."""
    grid = QUICK_GRID if bench.quick else GRID
    if args.keys:
        grid = ((grid[0][0], tuple(args.keys)),)
    rows: list[dict[str, Any]] = []
    for shape, lengths in grid:
        for dtype in args.dtypes:
            hopeless: set[str] = set()
            for keys in sorted(lengths):
                if hopeless:
                    bench.notes.append(f"left out at {keys} keys, {dtype}: {', '.join(sorted(hopeless))}")
                case = _case(bench, shape, keys, dtype, hopeless)
                rows += case
                peer_ms = {row["method"]: row["ms"] for row in case if row["ms"] and not row["ours"]}
                hopeless |= {way for way, ms in peer_ms.items() if ms > HOPELESS * min(peer_ms.values())}
    return {
        "rows": rows,
        "slopes": slopes(rows, lambda row: f"{row['method']}, {row['heads']}, {row['dtype']}"),
    }


def _case(bench: Bench, shape: tuple[int, int, int], keys: int, dtype: str, without: set[str]) -> list[dict[str, Any]]:
    heads, kv_heads, dim = shape
    rng = np.random.default_rng(0)
    q = gaussian(rng, (1, heads, 1, dim), DTYPES[dtype])
    k, v = (gaussian(rng, (1, kv_heads, keys, dim), DTYPES[dtype]) for _ in "kv")
    bench.say(f"decode {heads}/{kv_heads} x {dim}, {keys} keys, {dtype}")
    candidates = [Candidate(OURS, lambda: la.attention(q, k, v, causal=True), peer=False)]
    if bench.peers:
        candidates += [way for way in peers.decode(q, k, v) if way.name not in without]
    outcomes = bench.interleave(candidates)
    exact = quality.exact_decode(q[0, :, 0], k[0], v[0])
    read = bench.recent_read_gb_s()
    case = {"query_heads": heads, "kv_heads": kv_heads, "head_dim": dim, "keys": keys, "dtype": dtype}
    rows = rows_of(outcomes, OURS, {"heads": f"{heads}/{kv_heads}", **case})
    for row in rows:
        outcome = outcomes[row["method"]]
        if not outcome.failure:
            row["gb_s"] = (k.nbytes + v.nbytes) / outcome.median_ms / 1e6
            row["of_read"] = row["gb_s"] / read
            row["error"] = float(np.abs(peers.to_numpy(outcome.result)[0, :, 0] - exact).max())
    return rows


def panels(result: dict[str, Any]) -> list[Panel]:
    """Time over length, a panel per dtype."""
    rows = [row for row in result["rows"] if row["heads"] == result["rows"][0]["heads"]]
    shape = f"{rows[0]['heads']} x {rows[0]['head_dim']}"
    return [
        Panel(
            f"decode {shape}, {dtype}",
            "keys",
            "ms",
            series([row for row in rows if row["dtype"] == dtype], "keys", "ms"),
        )
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    ]
