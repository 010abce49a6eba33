"""One query row per head over a long cache: bound by reading keys and values once.

GB/s counts each K and V byte once, in the dtype in which it is stored, however often a candidate reads it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn.bench import peers, quality
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
from longattn.bench.targets import GQA, LONG, MHA, Target

SUMMARY = "one query row per head over a long cache, against every way torch has"
OURS = "longattn.attention"
CODED = ("int8", "int4")
FLOAT32 = "float32"
HOPELESS = 20  # times the fastest peer: such a way is left out at longer lengths
EXACT_ROWS = 1 << 17  # keys, of all heads together, that are attended in float64 to know the error
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
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
    Column("vs best torch", "vs_best_torch", ".2f"),
    Column("vs enable_gqa", "vs_enable_gqa", ".2f"),
    Column("vs torch float32", "vs_torch_float32", ".2f"),
    Column("max error", "error", ".1e"),
)
GRID = Grid(
    heads=((32, 8), (32, 32), (64, 8)),
    head_dims=(64, 128),
    keys=(8192, 32768, 131072),
    dtypes=(*DTYPES, *CODED),
)
QUICK_GRID = Grid(heads=((8, 2), (2, 2)), head_dims=(64,), keys=(256, 1024), dtypes=GRID.dtypes)
LINE = ("method", "heads", "head_dim", "dtype", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    add_grid(parser, GRID, heads=True)


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All cases of the grid; rows, and the growth exponent of each line timed at several lengths."""
    grid = chosen_grid(args, GRID, QUICK_GRID)
    rows: list[Row] = []
    hopeless: dict[tuple[str, str, int], set[str]] = {}
    for case, ours in sweep(bench, grid):
        for threads in bench.each_threads():
            without = hopeless.setdefault((case.label, case.stored, threads), set())
            theirs = [way for way in case.torch_ways(bench) if way.name not in without]
            if case.keys > min(grid.keys):
                theirs = [way for way in theirs if way.name not in peers.COPIES]
            found = measure_case(bench, case, ours, theirs)
            rows += found
            slow = _hopeless(found) - set(peers.COPIES)
            if slow and case.keys < max(grid.keys):
                where = f"{case.label}, {case.stored}, {count(threads)}"
                bench.notes.append(f"left out beyond {case.keys} keys ({where}): {', '.join(sorted(slow))}")
            without |= slow
        del case, ours  # before the next ones are made
    return {"rows": rows, "slopes": slopes(rows, LINE)}


def sweep(bench: Bench, grid: Grid) -> Iterator[tuple[Case, list[Way]]]:
    """Every case of the grid with what is ours of it: int8 and int4 in the case whose arrays are float32."""
    for heads, dim in itertools.product(grid.heads, grid.head_dims):
        for keys, stored in itertools.product(sorted(grid.keys), DTYPES):
            wanted = [dtype for dtype in grid.dtypes if dtype == stored or (stored == FLOAT32 and dtype in CODED)]
            if wanted:
                bench.say(f"decode {heads[0]}/{heads[1]} x {dim}, {keys} keys, {', '.join(wanted)}")
                case = Case(heads, dim, keys, stored)
                yield case, [case.ours(dtype) for dtype in wanted]
                del case


def _hopeless(rows: Sequence[Row]) -> set[str]:
    """Peers far behind the fastest one. torch's default way stays: it is what ours is compared with."""
    times = {row["method"]: row["ms"] for row in rows if row["ms"] and not row["ours"]}
    return {way for way, ms in times.items() if ms > HOPELESS * min(times.values()) and way not in peers.DEFAULT_DECODE}


@dataclass(frozen=True)
class Way:
    """A candidate, the dtype in which it has keys and values, and their bytes."""

    candidate: Candidate
    dtype: str
    nbytes: int


class Case:
    """Queries, keys and values of one shape, and what attends to them.

    Args:
        heads: query and KV heads.
        dim: head_dim.
        keys: length.
        stored: dtype of queries, keys and values: float32, bfloat16 or float16.
    """

    def __init__(self, heads: tuple[int, int], dim: int, keys: int, stored: str) -> None:
        self.query_heads, self.kv_heads = heads
        self.dim, self.keys, self.stored = dim, keys, stored
        rng = np.random.default_rng(0)
        self.q = gaussian(rng, (1, self.query_heads, 1, dim), DTYPES[stored])
        self.k, self.v = (gaussian(rng, (1, self.kv_heads, keys, dim), DTYPES[stored]) for _ in "kv")

    @property
    def label(self) -> str:
        """Heads and width in words."""
        return f"{self.query_heads}/{self.kv_heads} x {self.dim}"

    @property
    def columns(self) -> dict[str, Any]:
        """What every row of the case says about it."""
        return {
            "heads": f"{self.query_heads}/{self.kv_heads}",
            "query_heads": self.query_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.dim,
            "keys": self.keys,
        }

    def ours(self, dtype: str) -> Way:
        """Attention over the arrays, or over a store that codes them as `dtype` (int8 or int4)."""
        q, k, v = self.q, self.k, self.v
        if dtype == self.stored:
            return self.way(Candidate(OURS, lambda: la.attention(q, k, v, causal=True), peer=False))
        store = la.KVStore(kv_heads=self.kv_heads, head_dim=self.dim, dtype=dtype, capacity=self.keys)
        store.append(k, v)
        keys, values = store.keys, store.values
        call = Candidate(f"{OURS}, {dtype}", lambda: la.attention(q[0], keys, values, causal=True), peer=False)
        return Way(call, dtype, keys.nbytes + values.nbytes)

    def way(self, candidate: Candidate) -> Way:
        """A candidate that reads the arrays themselves."""
        return Way(candidate, self.stored, self.k.nbytes + self.v.nbytes)

    def torch_ways(self, bench: Bench) -> list[Candidate]:
        """What torch has over the same arrays, if peers are wanted."""
        return peers.decode(self.q, self.k, self.v) if bench.peers else []

    @functools.cached_property
    def _exact(self) -> tuple[list[int], NDArray[np.float64]]:
        """Some KV heads, spread evenly, and the exact output of their query heads, one after the other."""
        looked_at = min(self.kv_heads, max(2, EXACT_ROWS // self.keys))
        chosen = sorted({round(head) for head in np.linspace(0, self.kv_heads - 1, looked_at)})
        grouped = self.q.reshape(self.kv_heads, -1, self.dim)
        out = [quality.exact(grouped[head], self.k[0, head], self.v[0, head]).out for head in chosen]
        return chosen, np.stack(out)

    def error(self, result: Any) -> float:
        """Largest difference from exact attention over what is stored as floats, in the heads looked at."""
        chosen, exact = self._exact
        out = peers.to_numpy(result).reshape(self.kv_heads, -1, self.dim)
        return float(np.abs(out[chosen] - exact).max())


def measure_case(bench: Bench, case: Case, ours: Sequence[Way], theirs: Sequence[Candidate | Way]) -> list[Row]:
    """Rows of one case at the current thread count, ours first; ratios to the peers on the rows that are ours."""
    ways = [*ours, *(way if isinstance(way, Way) else case.way(way) for way in theirs)]
    outcomes = bench.interleave([way.candidate for way in ways])
    read = bench.recent_read_gb_s()
    rows = []
    for dtype in dict.fromkeys(way.dtype for way in ways):
        named = {way.candidate.name: way for way in ways if way.dtype == dtype}
        mine = next((way.candidate.name for way in ours if way.dtype == dtype), None)
        some = rows_of(
            {name: outcomes[name] for name in named},
            mine,
            {"threads": bench.threads, **case.columns, "dtype": dtype},
        )
        for row in some:
            if row["ms"] is not None:
                row["gb_s"] = named[row["method"]].nbytes / row["ms"] / 1e6
                row["of_read"] = row["gb_s"] / read
                row["error"] = case.error(outcomes[row["method"]].result)
        rows += some
    _compare(rows)
    return rows


def _compare(rows: Sequence[Row]) -> None:
    """Adds by what factor each row of ours is faster than torch's best way and than its default for groups."""
    torch = {row["method"]: row for row in rows if row["method"].startswith("torch") and row["ms"] is not None}
    if not torch:
        return
    best = min(torch.values(), key=lambda row: float(row["ms"]))
    default = torch.get(peers.ENABLE_GQA)
    for row in rows:
        if row["ours"]:
            row["best_torch"], row["best_torch_ms"] = best["method"], best["ms"]
            if row["dtype"] == best["dtype"]:
                row["vs_best_torch"] = best["ms"] / row["ms"]
                row["vs_enable_gqa"] = default["ms"] / row["ms"] if default else None
            if best["dtype"] == FLOAT32:
                row["vs_torch_float32"] = best["ms"] / row["ms"]


def panels(result: Result) -> list[Panel | Bars]:
    """Share of the read bandwidth over length, a line per dtype; a panel per heads, width and thread count."""
    ours = [_percent(row) for row in result["rows"] if row["ours"]]
    return [
        Panel(
            f"decode {heads} x {dim}, {count(threads)}",
            "keys",
            "% of read bandwidth",
            series(rows, "keys", "percent", by="dtype"),
            log_y=False,
            limit=100,
        )
        for (heads, dim, threads), rows in grouped(ours, "heads", "head_dim", "threads").items()
    ]


def _percent(row: Mapping[str, Any]) -> Row:
    return {**row, "percent": 100 * row["of_read"]}


def _tables(found: Sequence[Result]) -> list[str]:
    rows = [row for row in all_rows(found, "decode") if row["ours"]]
    grown = all_rows(found, "decode", "slopes")
    lengths = values_of(rows, "keys")
    heads = ["Hq/Hkv", "D", "dtype", *(f"{short(n)}: ms (of read)" for n in lengths), "slope"]
    heads += [f"{short(n)}: × torch (× default)" for n in lengths] + ["max error"]
    lines: list[str] = []
    for threads in values_of(rows, "threads"):
        cells = []
        mine = [row for row in rows if row["threads"] == threads]
        for by_length in by_lengths(mine, ("heads", "head_dim", "dtype")).values():
            some = next(iter(by_length.values()))
            times, ratios = [], []
            for n in lengths:
                row = by_length.get(n, {})
                times.append(f"{row['ms']:.3g} ({row['of_read']:.0%})" if row else "")
                best = row.get("vs_best_torch") or row.get("vs_torch_float32")
                default = row.get("vs_enable_gqa")
                ratios.append(number(best, ".1f") + (f" ({default:.0f})" if default else ""))
            worst = max(row["error"] for row in by_length.values())
            slope = slope_of(grown, LINE, some)
            cells.append([some["heads"], str(some["head_dim"]), some["dtype"], *times, slope, *ratios, f"{worst:.0e}"])
        lines += titled(threads, grid(heads, cells))
    return lines


def _ratios(rows: Sequence[Row]) -> list[Panel | Bars | Scatter]:
    """Speed against torch's best form at the greatest length, a panel per width and thread count."""
    ours = [row for row in rows if row["ours"] and row["keys"] == max(values_of(rows, "keys"))]
    dtypes = tuple(dict.fromkeys(row["dtype"] for row in ours))
    panels: list[Panel | Bars | Scatter] = []
    for threads in values_of(ours, "threads"):
        for dim in values_of(ours, "head_dim"):
            mine = [row for row in ours if (row["threads"], row["head_dim"]) == (threads, dim)]
            bars = {
                heads: tuple(_first(mine, heads, dtype) for dtype in dtypes)
                for heads in dict.fromkeys(row["heads"] for row in mine)
            }
            title = f"D {dim}, {short(mine[0]['keys'])} keys, {count(threads)}: times as fast as torch's best"
            panels.append(Bars(title, "ratio (int8, int4: to float32)", dtypes, bars, limit=1))
    return panels


def _first(rows: Sequence[Row], heads: str, dtype: str) -> float | None:
    for row in rows:
        if (row["heads"], row["dtype"]) == (heads, dtype):
            ratio: float | None = row.get("vs_best_torch") or row.get("vs_torch_float32")
            return ratio
    return None


def _targets() -> list[Target]:
    command = "longattn bench decode --threads 1,2"
    share = [
        Target(
            f"decode, {dtype}: share of the read bandwidth, N ≥ 32K",
            "decode",
            "of_read",
            bound,
            command,
            {"ours": (True,), "dtype": (dtype,)},
            {"keys": (LONG, float("inf"))},
            form=".0%",
        )
        for dtype, bound in (("float32", 0.85), ("bfloat16", 0.85), ("float16", 0.85), ("int8", 0.7), ("int4", 0.5))
    ]
    ratios = [
        (GQA, "float32", "vs_best_torch", 1.2),
        (GQA, "bfloat16", "vs_best_torch", 1.8),
        (GQA, "float16", "vs_best_torch", 1.8),
        (GQA, "bfloat16", "vs_enable_gqa", 25.0),
        (MHA, "float32", "vs_best_torch", 1.0),
        (MHA, "bfloat16", "vs_best_torch", 1.4),
        (MHA, "float16", "vs_best_torch", 1.4),
        (GQA + MHA, "int8", "vs_torch_float32", 4.0),
    ]
    against = {
        "vs_best_torch": "torch's best form",
        "vs_enable_gqa": peers.ENABLE_GQA,
        "vs_torch_float32": "torch's best float32 form",
    }
    kinds = {GQA: "GQA decode", MHA: "MHA decode", GQA + MHA: "decode"}
    return share + [
        Target(
            f"{kinds[heads]}, {dtype}: speed against {against[figure]}",
            "decode",
            figure,
            bound,
            command,
            {"ours": (True,), "dtype": (dtype,), "heads": heads},
        )
        for heads, dtype, figure, bound in ratios
    ]


def _figures(found: Sequence[Result]) -> Figures:
    rows = all_rows(found, "decode")
    drawn: dict[str, list[Panel | Bars | Scatter]] = {
        f"decode-{threads}": list(panels({"rows": [row for row in rows if row["threads"] == threads]}))
        for threads in values_of(rows, "threads")
    }
    if any(row.get("vs_best_torch") for row in rows):
        drawn["decode-ratios"] = _ratios(rows)
    return drawn


SECTIONS = (
    Section(
        "dense",
        "decode",
        "Decode: one query row over a long cache",
        "`of read`: own bytes of K and V per second over the read bandwidth. `× torch`: speed against the best "
        "of torch's forms in the same dtype, for int8 and int4 against the best in float32; in brackets against the "
        "default `enable_gqa` call. `slope`: of log time over log length.",
        _tables,
        _figures,
    ),
)
TARGETS = tuple(_targets())
