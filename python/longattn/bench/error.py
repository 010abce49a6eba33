"""What storing keys and values in fewer bits costs: the error of attention, bytes per row, conversion speed.

Attention over a store is compared with attention in float64 over the float32 originals. Queries are float32, so
the figures hold the error of storage and of float32 arithmetic, not that of rounding a query. The recorded sets
were recorded in float16, which therefore stores them without an error.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

import longattn as la
from longattn import vectors
from longattn.bench import quality
from longattn.bench.arrays import gaussian
from longattn.bench.harness import Bench, timed
from longattn.bench.options import names
from longattn.bench.plots import Bars, Panel
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, whole
from longattn.bench.tables import Column, table
from longattn.vectors.command import progress_line

SUMMARY = "error of every storage dtype and quantisation against float64, its bytes per row and its conversion speed"
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "int8, channel scales": {"dtype": "int8", "channel_scales": True},
    "int4": {"dtype": "int4"},
    "int4, groups of 32": {"dtype": "int4", "group_size": 32},
    "int4, channel scales": {"dtype": "int4", "channel_scales": True},
}
GAUSSIAN = "gaussian"
SETS = (GAUSSIAN, *vectors.names())
DEFAULT_SETS = (GAUSSIAN, "synthetic", *vectors.RECORDED)
QUICK_SETS, QUICK_LENGTH, QUICK_GROUPS = (GAUSSIAN, "synthetic"), 512, 2
COLUMNS: tuple[Column, ...] = (
    Column("vectors", "vectors"),
    Column("Hq/Hkv×D", "shape"),
    Column("keys", "keys"),
    Column("storage", "storage"),
    Column("bytes per row", "bytes_per_row", ".0f"),
    Column("of float32", "of_float32", ".1%"),
    Column("error/‖o‖", "error_o", ".1e"),
    Column("p95", "error_o_p95", ".1e"),
    Column("error/rms‖v‖", "error_v", ".1e"),
    Column("max error", "error_max", ".1e"),
    Column("max lse error", "error_lse", ".1e"),
    Column("append, GB/s", "append_gb_s", ".2f"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument(
        "--vectors",
        type=names(SETS),
        metavar="NAME,...",
        help=f"comma-separated, some of {', '.join(SETS)} (default {','.join(DEFAULT_SETS)})",
    )
    parser.add_argument("--length", type=int, default=16384, help="keys (default %(default)s)")
    parser.add_argument("--groups", type=int, default=16, help="queries per head (default %(default)s)")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Every set in every format; conversion is timed with the last thread count."""
    bench.use(bench.thread_counts[-1])
    length = min(args.length, QUICK_LENGTH) if bench.quick else args.length
    groups = min(args.groups, QUICK_GROUPS) if bench.quick else args.groups
    rows: list[Row] = []
    for name in args.vectors or (QUICK_SETS if bench.quick else DEFAULT_SETS):
        try:
            data = _load(name, length, groups)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            if args.vectors:
                raise
            bench.notes.append(f"{name} left out: {error}")
            continue
        truth = _exact(data)
        for storage, options in FORMATS.items():
            bench.say(f"error on {name}, {length} keys: {storage}")
            store = la.KVStore(
                kv_heads=data.kv_heads,
                head_dim=data.head_dim,
                value_dim=data.values.shape[2],
                capacity=len(data),
                **options,
            )
            rows.append(_row(bench, data, truth, store, storage))
    return {"rows": rows, "slopes": []}


def _load(name: str, length: int, groups: int) -> vectors.Vectors:
    if name != GAUSSIAN:
        vectors.prepare(name, progress=progress_line(name))
        return vectors.load(name, length=length, groups=groups)
    rng = np.random.default_rng(0)
    keys, values = (gaussian(rng, (8, length, 128), np.float32) for _ in "kv")
    queries = gaussian(rng, (groups, 32, 128), np.float32)
    return vectors.Vectors(GAUSSIAN, tuple("01234567"), keys, values, queries, queries)


def _exact(data: vectors.Vectors) -> quality.Exact:
    """The lse `[groups, Hq]` and output `[groups, Hq, Dv]` in float64; the weights are not kept."""
    per_head = []
    for h in range(data.kv_heads):
        mine = data.queries[:, h * data.group : (h + 1) * data.group]
        found = quality.exact(mine.reshape(-1, data.head_dim), data.keys[h], data.values[h])
        per_head.append((found.lse.reshape(mine.shape[:2]), found.out.reshape(*mine.shape[:2], -1)))
    lse, out = (np.concatenate(parts, 1) for parts in zip(*per_head, strict=True))
    return quality.Exact(np.empty(0), lse, out)


def _row(bench: Bench, data: vectors.Vectors, truth: quality.Exact, store: la.KVStore, storage: str) -> Row:
    def append() -> None:
        store.clear()
        store.append(data.keys, data.values)

    append()
    seconds = statistics.median(timed(append)[0] for _ in range(bench.rounds))
    keys, values = store.keys, store.values
    q = np.ascontiguousarray(data.queries.swapaxes(0, 1))
    out, lse = la.attention(q, keys, values, return_lse=True)
    error = np.linalg.norm(out.swapaxes(0, 1) - truth.out, axis=-1)
    relative = error / np.linalg.norm(truth.out, axis=-1)
    value_norm = np.sqrt(np.mean(np.sum(data.values.astype(np.float64) ** 2, -1)))
    originals = data.keys.nbytes + data.values.nbytes
    nbytes = keys.nbytes + values.nbytes
    return {
        "vectors": data.name,
        "shape": f"{data.query_heads}/{data.kv_heads}×{data.head_dim}",
        "keys": len(data),
        "storage": storage,
        "method": "longattn.attention",
        "threads": bench.threads,
        "bytes_per_row": nbytes / (data.kv_heads * len(data)),
        "of_float32": nbytes / originals,
        "error_o": float(relative.mean()),
        "error_o_p95": float(np.percentile(relative, 95)),
        "error_v": float(error.mean() / value_norm),
        "error_max": float(np.abs(out.swapaxes(0, 1) - truth.out).max()),
        "error_lse": float(np.abs(lse.T - truth.lse).max()),
        "append_gb_s": originals / seconds / 1e9,
    }


def panels(result: Result) -> list[Panel | Bars]:
    """Relative error of each format, a group of bars per set."""
    rows = result["rows"]
    sets = tuple(dict.fromkeys(row["vectors"] for row in rows))
    found = {(row["vectors"], row["storage"]): row["error_o"] for row in rows}
    bars = {
        storage: tuple(found.get((name, storage)) for name in sets)
        for storage in dict.fromkeys(row["storage"] for row in rows)
    }
    return [Bars("error of attention by storage", "mean |o - exact| / |exact|", sets, bars, log_y=True)]


def _tables(found: Sequence[Result]) -> list[str]:
    rows = all_rows(found, "error")
    return ["", *table(rows, COLUMNS)] if rows else []


SECTIONS = (
    Section(
        "dense",
        "error",
        "Error of storage",
        "Attention over stored keys and values against float64 attention over the float32 originals; relative to the "
        "norm of the output (mean and 95th percentile over queries and heads) and to the rms row norm of V. `append`: "
        "float32 bytes converted and stored per second, fresh memory included. `minilm` and `lm` are recordings in "
        "float16, which stores them without an error.",
        _tables,
        whole("error", panels),
    ),
)
