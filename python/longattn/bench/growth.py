"""How the time of a decode step grows with the length, each way at the smallest budget that keeps a mean error.

Every way is measured at every length on its own: index, smallest number of rows that keeps the error, time beside
exact attention's. With `--json` each figure is written as soon as it is there, and the same command goes on where it
was stopped. What was not run says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import longattn as la
from longattn import vectors
from longattn.bench.arrays import DTYPES
from longattn.bench.asked import Asked, Built
from longattn.bench.harness import Bench, Candidate, slopes
from longattn.bench.kept import Kept
from longattn.bench.options import integers
from longattn.bench.plots import Bars, Panel, Scatter
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, by_lengths, grouped, number, short, slope_of, values_of, whole
from longattn.bench.stored import empty_store, prepared
from longattn.bench.tables import Column, count, grid
from longattn.bench.targets import Target
from longattn.retrieval.ways import WAYS, Way, chosen

ROUTINE = "growth"
SUMMARY = "time of a decode step over the length at equal error, every way to read a part of a store"
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("vectors", "vectors"),
    Column("keys", "keys"),
    Column("way", "method"),
    Column("ms", "ms", ".3g"),
    Column("min", "ms_min", ".3g"),
    Column("max", "ms_max", ".3g"),
    Column("vs la.attention", "faster_than_exact", ".1f"),
    Column("rows", "rows_read", ".2%"),
    Column("top_k", "top_k"),
    Column("error/rms‖v‖", "error_v", ".4f"),
    Column("build s", "build_s", ".2f"),
    Column("index B/key", "index_bytes_per_key", ".1f"),
    Column("not run", "reason"),
)
EXACT = "longattn.attention"
SETS = ("synthetic", "synthetic-flat", "lm")
LENGTHS = (16_384, 65_536, 262_144, 1_048_576)
RECORDED_LENGTHS = (16_384, 32_768, 65_536, 131_072)
QUICK_LENGTHS, QUICK_WINDOW = (4096, 8192), 64
SUBLINEAR = ("clusters", "pages", "graph")
LEAST = 16
HALVINGS = 3
LINE = ("method", "vectors", "threads")
SAME = ("heads", "error", "groups", "dtype", "sinks", "window", "most", "quick")
"""Settings that rows of an earlier run must share to count."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument("--vectors", default=",".join(SETS), help="comma-separated (default %(default)s)")
    parser.add_argument("--heads", help="KV heads by name, comma-separated (default: the first of the set's choice)")
    parser.add_argument("--ways", default="all", help="only those whose name contains one of these (default all)")
    parser.add_argument(
        "--keys",
        type=integers,
        metavar="N,N",
        help=f"lengths (default {', '.join(map(str, LENGTHS))}; recorded {', '.join(map(str, RECORDED_LENGTHS))})",
    )
    parser.add_argument(
        "--error", type=float, default=0.02, help="mean error over the rms norm of the values (default %(default)s)"
    )
    parser.add_argument(
        "--most", type=float, default=0.25, help="share of the rows that a budget may be (default %(default)s)"
    )
    parser.add_argument(
        "--build-limit",
        type=float,
        default=900.0,
        metavar="S",
        help="leave out what would take longer to build, by what shorter lengths took (default %(default)s)",
    )
    parser.add_argument("--groups", type=int, default=12, help="queries (default %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the store (default %(default)s)")
    parser.add_argument("--sinks", type=int, default=4, help="first rows that are always read (default %(default)s)")
    parser.add_argument("--window", type=int, default=64, help="last rows that are always read (default %(default)s)")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Every data set, length and way that is not in the file yet."""
    if not args.error > 0:
        raise ValueError(f"--error: got {args.error}, expected a number above 0")
    if not 0 < args.most <= 1:
        raise ValueError(f"--most: got {args.most}, expected a share, above 0 and at most 1")
    ways = chosen(args.ways)
    kept = Kept(bench, args, ROUTINE, SAME, _figures)
    rows = kept.rows
    for name in prepared(bench, args.vectors.split(","), asked=args.vectors != ",".join(SETS)):
        recorded = vectors.RECORDED[name].open() if name in vectors.RECORDED else None
        most = recorded.keys.shape[1] if recorded else None
        heads = args.heads.split(",") if args.heads else [recorded.default_heads[0] if recorded else "0"]
        for length in args.keys or (QUICK_LENGTHS if bench.quick else RECORDED_LENGTHS if recorded else LENGTHS):
            done = {(row["threads"], row["method"]) for row in _of(rows, name, length)}
            wanted = [
                (threads, way) for threads in bench.thread_counts for way in ways if (threads, way.name) not in done
            ]
            if not wanted:
                bench.say(f"growth on {name}, {length} keys: there already")
                continue
            if most and length > most:
                for threads, way in wanted:
                    kept.keep(_not_run(threads, name, length, way.name, f"{most} keys were recorded"))
                continue
            bench.say(f"growth on {name}, {length} keys: loading")
            groups = 3 if bench.quick else args.groups
            data = vectors.load(name, length=length, groups=groups, heads=heads)
            _Case(bench, args, data, rows, kept.keep).measure(wanted)
    bench.notes += [f"time grows as length^{line['slope']:.2f}: {line['of']}" for line in _slopes(rows)]
    return _figures(rows)


def _of(rows: Sequence[Row], name: str, length: int) -> list[Row]:
    return [row for row in rows if (row["vectors"], row["keys"]) == (name, length)]


def _not_run(threads: int, name: str, length: int, method: str, reason: str) -> Row:
    return {"threads": threads, "vectors": name, "keys": length, "method": method, "ms": None, "reason": reason}


def _slopes(rows: Sequence[Row]) -> list[Row]:
    return slopes(rows, LINE)


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows, slopes, and of each set the least slope among ways that need not look at every row.

    Such a way must have been timed at every length that the set has.
    """
    found = _slopes(rows)
    kinds = {way.name: way.kind for way in WAYS}
    lengths = {name: {row["keys"] for row in rows if row["vectors"] == name} for name in {r["vectors"] for r in rows}}
    timed: dict[tuple[Any, ...], set[int]] = {}
    for row in rows:
        if row["ms"] is not None:
            timed.setdefault(tuple(row[key] for key in LINE), set()).add(row["keys"])
    best: dict[tuple[Any, ...], Row] = {}
    for line in found:
        key = line["vectors"], line["threads"]
        whole = timed[tuple(line[key] for key in LINE)] == lengths[line["vectors"]]
        if kinds.get(line["method"]) not in SUBLINEAR or not whole:
            continue
        if key not in best or line["slope"] < best[key]["slope"]:
            best[key] = line
    return {"rows": list(rows), "slopes": found, "best_slopes": list(best.values())}


class _Case:
    """One data set of one length."""

    def __init__(
        self,
        bench: Bench,
        args: argparse.Namespace,
        data: vectors.Vectors,
        rows: Sequence[Row],
        keep: Callable[[Row], None],
    ) -> None:
        self.bench, self.args, self.data, self.earlier, self.keep = bench, args, data, rows, keep
        store = empty_store(data, args.dtype)
        store.append(data.keys, data.values)
        window = min(args.window, QUICK_WINDOW) if bench.quick else args.window
        self.asked = asked = Asked(data, store, args.dtype, args.sinks, window)
        # All see all rows: one call without causality.
        together = np.ascontiguousarray(asked.queries.swapaxes(0, 1)).astype(np.float32)
        self.exact = la.attention(together, store.keys, store.values).swapaxes(0, 1)
        norms = [np.sqrt(np.mean(np.sum(np.asarray(v, np.float32) ** 2, -1))) for v in store.values]
        self.norms = np.repeat(norms, data.group)

    def measure(self, wanted: Sequence[tuple[int, Way]]) -> None:
        """A row for each thread count and way; an index is built once."""
        for way in dict.fromkeys(way.name for _, way in wanted):
            mine = [(threads, one) for threads, one in wanted if one.name == way]
            one = mine[0][1]
            reason = self._too_long(one)
            if reason:
                for threads, _ in mine:
                    self.keep(_not_run(threads, self.data.name, len(self.data), way, reason))
                continue
            self.bench.say(f"growth on {self.data.name}, {len(self.data)} keys: {way}")
            self.bench.use(mine[0][0])
            built = self.asked.build(one)
            top_k, error = self._budget(built)
            for threads, _ in mine:
                if top_k is None:
                    reason = f"error {error:.3f} with {self.args.most:.0%} of the rows"
                    row = _not_run(threads, self.data.name, len(self.data), way, reason)
                    self.keep(row | {"build_s": built.seconds})
                else:
                    self.bench.use(threads)
                    self.keep(self._timed(threads, built, top_k, error))

    def _too_long(self, way: Way) -> str | None:
        """Why it is not built: by what a shorter length took, growing as the length."""
        shorter = [
            row
            for row in self.earlier
            if row["vectors"] == self.data.name and row["method"] == way.name and row.get("build_s") is not None
        ]
        if not shorter:
            return None
        last = max(shorter, key=lambda row: int(row["keys"]))
        seconds = last["build_s"] * len(self.data) / last["keys"]
        if seconds <= self.args.build_limit:
            return None
        return f"would take {seconds:.0f} s to build, at {last['keys']} keys it was {last['build_s']:.0f} s"

    def _error(self, built: Built, top_k: int) -> float:
        outs = [self.asked.retrieve(built, query[:, None], top_k).out[:, 0] for query in self.asked.queries]
        difference = np.stack(outs).astype(np.float32) - self.exact
        return float((np.linalg.norm(difference, axis=-1) / self.norms).mean())

    def _budget(self, built: Built) -> tuple[int | None, float]:
        """The smallest budget that keeps the error, to a tenth, with its error; `None` with the error of the most."""
        most = max(LEAST, round(self.args.most * len(self.data)))
        allowed = self.args.error
        good, error = most, self._error(built, most)
        if error > allowed:
            return None, error
        bad = LEAST // 2
        top_k = LEAST
        while top_k < most:
            found = self._error(built, top_k)
            if found <= allowed:
                good, error = top_k, found
                break
            bad, top_k = top_k, top_k * 2
        if good > LEAST:
            for _ in range(HALVINGS):
                middle = round((bad * good) ** 0.5)
                if not bad < middle < good:
                    break
                found = self._error(built, middle)
                if found <= allowed:
                    good, error = middle, found
                else:
                    bad = middle
        return good, error

    def _timed(self, threads: int, built: Built, top_k: int, error: float) -> Row:
        asked, data = self.asked, self.data
        q = np.ascontiguousarray(asked.queries[0][:, None])
        keys, values = asked.store.keys, asked.store.values
        outcomes = self.bench.interleave(
            [
                Candidate(built.way.name, asked.rotating(built, top_k), peer=False),
                Candidate(EXACT, lambda: la.attention(q, keys, values, causal=True), peer=False),
            ]
        )
        ours, exact_ms = outcomes[built.way.name], outcomes[EXACT].median_ms
        stats = [asked.retrieve(built, query[:, None], top_k).stats for query in asked.queries]
        attended = float(np.mean([s.keys_attended.mean() for s in stats if s is not None]))
        row: Row = {"threads": threads, "vectors": data.name, "keys": len(data), "method": built.way.name}
        return row | {
            **ours.columns(),
            "exact_ms": exact_ms,
            "faster_than_exact": exact_ms / ours.median_ms,
            "top_k": top_k,
            "rows_read": attended / len(data),
            "error_v": error,
            "build_s": built.seconds,
            "index_bytes": built.index.nbytes,
            "index_bytes_per_key": built.index.nbytes / (data.kv_heads * len(data)),
        }


def panels(result: Result | Mapping[str, Any]) -> list[Panel | Bars | Scatter]:
    """Time over length, a panel per data set; exact attention beside the ways."""
    drawn: list[Panel | Bars | Scatter] = []
    rows = [row for row in result["rows"] if row.get("ms")]
    for (name, _), mine in grouped(rows, "vectors", "threads").items():
        series: dict[str, list[tuple[float, float]]] = {}
        for row in mine:
            series.setdefault(row["method"], []).append((row["keys"], row["ms"]))
        exact: dict[int, list[float]] = {}
        for row in mine:
            exact.setdefault(row["keys"], []).append(row["exact_ms"])
        series[EXACT] = [(keys, float(np.median(times))) for keys, times in exact.items()]
        drawn.append(Panel(f"decode step at equal error, {name}", "keys", "ms", series))
    return drawn


def _tables(found: Sequence[Result]) -> list[str]:
    grown = all_rows(found, "growth", "slopes")
    lines: list[str] = []
    for (name, threads), mine in grouped(all_rows(found, "growth"), "vectors", "threads").items():
        lengths = values_of(mine, "keys")
        heads = ["way", *(f"{short(n)}: ms (rows)" for n in lengths), "slope"]
        heads += [f"× la.attention at {short(lengths[-1])}", "build s", "not run"]
        cells = []
        for by_length in by_lengths(mine, LINE).values():
            some, last = next(iter(by_length.values())), by_length.get(lengths[-1], {})
            times = [_way_at(by_length.get(n, {})) for n in lengths]
            why = "; ".join(f"{short(n)}: {row['reason']}" for n, row in by_length.items() if row.get("reason"))
            faster, seconds = number(last.get("faster_than_exact"), ".1f"), number(last.get("build_s"), ".1f")
            cells.append([some["method"], *times, slope_of(grown, LINE, some), faster, seconds, why])
        lines += ["", f"{name}, {count(threads)}:", "", *grid(heads, cells)]
    return lines


def _way_at(row: Row) -> str:
    return f"{row['ms']:.3g} ({row['rows_read']:.2%})" if row.get("ms") is not None else ""


SECTIONS = (
    Section(
        "retrieval",
        "growth",
        "Growth with the length",
        "A decode step of one KV head, each way with the smallest number of rows that keeps the mean error below the "
        "same share of the values' rms norm. `slope`: of log time over log length. Empty cells were not run, for the "
        "reason in the last column.",
        _tables,
        whole("growth", panels),
    ),
)
TARGETS = (
    Target(
        "time at equal error grows as length to the power, the best way over clusters, pages or a graph",
        "growth",
        "slope",
        0.5,
        "longattn bench growth --threads 1",
        table="best_slopes",
        at_most=True,
    ),
)
