"""A decode step over a long store by `retrieval_attention`: its time beside exact attention's, what it keeps.

Every data set is measured in its own shape; `synthetic` has 32 query heads over 8 KV heads of 128.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn import vectors
from longattn.bench import peers, quality
from longattn.bench.arrays import DTYPES
from longattn.bench.harness import Bench, Candidate, slopes, timed
from longattn.bench.options import integers
from longattn.bench.plots import Bars, Panel, series
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows
from longattn.bench.stored import empty_store, prepared
from longattn.bench.tables import Column, table
from longattn.bench.targets import Target

SUMMARY = "a decode step that reads a few per cent of a long store, against exact attention: time and quality"
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("vectors", "vectors"),
    Column("Hq/Hkv×D", "shape"),
    Column("keys", "keys"),
    Column("method", "method"),
    Column("ms", "ms", ".3g"),
    Column("min", "ms_min", ".3g"),
    Column("max", "ms_max", ".3g"),
    Column("first", "ms_first", ".3g"),
    Column("vs best torch", "faster_than_torch", ".1f"),
    Column("vs la.attention", "faster_than_exact", ".1f"),
    Column("rows read", "rows", ".2%"),
    Column("mass", "mass_read", ".3f"),
    Column("kept", "kept_shared", ".3f"),
    Column("selected kept", "selected_kept_shared", ".3f"),
    Column("(own best)", "selected_kept_own", ".3f"),
    Column("error/‖o‖", "error_o", ".3f"),
    Column("p95", "error_o_p95", ".3f"),
    Column("error/rms‖v‖", "error_v", ".4f"),
    Column("p95", "error_v_p95", ".4f"),
    Column("rows only /‖o‖", "error_o_rows_only", ".3f"),
    Column("missed", "missed", ".3f"),
    Column("est.", "missed_estimate", ".3f"),
)
#: What the scan of the codes reaches.
SCAN_COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("vectors", "vectors"),
    Column("Hq/Hkv×D", "shape"),
    Column("keys", "keys"),
    Column("method", "method"),
    Column("codes MB", "scan_mb", ".1f"),
    Column("read GB/s", "read_gb_s", ".1f"),
    Column("scan GB/s", "scan_gb_s", ".1f"),
    Column("of read", "scan_of_read", ".2f"),
    Column("scan ms", "scan_ms", ".2f"),
    Column("weigh ms", "weigh_ms", ".2f"),
    Column("select ms", "select_ms", ".2f"),
    Column("select/scan", "select_of_scan", ".2f"),
)
#: What making the index costs beside prefill.
BUILD_COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("vectors", "vectors"),
    Column("Hq/Hkv×D", "shape"),
    Column("keys", "keys"),
    Column("index build s", "build_s", ".3f"),
    Column("query rows timed", "prefill_rows"),
    Column("prefill s (scaled by pairs)", "prefill_s", ".2f"),
    Column("build/prefill", "build_of_prefill", ".1%"),
)
EXACT = "longattn.attention"
#: Last rows of a prefill whose attention is timed, for all of them.
PREFILL_ROWS = 256
QUICK_LENGTH, QUICK_WINDOW = 4096, 64
#: Seconds of calls that follow each other, as the steps of a decode do; every candidate's turn is one.
BURST_S = 0.03
Rest = Literal["values", "none"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument(
        "--vectors",
        help=f"comma-separated: {', '.join(vectors.names())} (default synthetic and the recorded)",
    )
    parser.add_argument("--heads", help="KV heads by name, comma-separated (default: the set's choice)")
    parser.add_argument("--top-k", type=integers, help="rows selected per KV head (default 256,2048)")
    parser.add_argument("--bits", type=int, default=4, help="of the signatures (default %(default)s)")
    parser.add_argument("--length", type=int, default=vectors.LENGTH, help="keys (default %(default)s)")
    parser.add_argument(
        "--groups", type=int, default=32, help="queries whose quality is measured (default %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bfloat16", help="of keys and values (default %(default)s)"
    )
    parser.add_argument("--sinks", type=int, default=4, help="first rows that are always read (default %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="last rows that are always read (default %(default)s)")
    parser.add_argument("--no-sweep", action="store_true", help="do not time shorter stores")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Every data set; rows, index figures per set, growth exponents."""
    names = (
        args.vectors.split(",")
        if args.vectors
        else (["synthetic"] if bench.quick else ["synthetic", *vectors.RECORDED])
    )
    length, groups = (min(args.length, QUICK_LENGTH), 4) if bench.quick else (args.length, args.groups)
    window = min(args.window, QUICK_WINDOW) if bench.quick else args.window
    top_ks = args.top_k or ([64] if bench.quick else [256, 2048])
    heads = args.heads.split(",") if args.heads else None
    rows: list[Row] = []
    indexes: dict[str, Any] = {}
    builds: list[Row] = []
    for name in prepared(bench, names, asked=bool(args.vectors)):
        bench.say(f"retrieval on {name}, {length} keys: loading")
        data = vectors.load(name, length=length, groups=groups, heads=heads)
        case = _Case(bench, data, args.dtype, args.bits, args.sinks, window)
        indexes[name] = figures = case.index_figures()
        share = figures["index_bytes"] / figures["store_bytes"]
        bench.notes.append(
            f"index of {name}: {figures['index_bytes'] / 1e6:.0f} MB, {share:.1%} of the store, "
            f"{figures['index_bytes_per_key']:.1f} bytes per key and head, made in {figures['build_s']:.1f} s"
        )
        builds.append(case.build_row())
        rows += case.rows(top_ks, with_quality=True)
        if not bench.quick and not args.no_sweep:
            for shorter in (length // 8, length // 4, length // 2):
                case = _Case(bench, _shortened(data, shorter), args.dtype, args.bits, args.sinks, window)
                rows += case.rows(top_ks[:1], with_quality=False)
    return {
        "rows": rows,
        "indexes": indexes,
        "builds": builds,
        "slopes": slopes(rows, ("method", "vectors", "threads")),
    }


class _Case:
    """One data set in a store with its index."""

    def __init__(self, bench: Bench, data: vectors.Vectors, dtype: str, bits: int, sinks: int, window: int) -> None:
        self.bench, self.data, self.sinks, self.window = bench, data, sinks, window
        self.dtype = DTYPES[dtype]
        self.store = empty_store(data, dtype)
        self.append_s, _ = timed(lambda: self.store.append(data.keys, data.values))
        self.build_s, self.index = timed(lambda: la.index.Signatures(self.store, bits=bits))
        self.build_s += timed(self.index.update)[0]
        self.queries = data.queries.astype(self.dtype)

    def index_figures(self) -> dict[str, Any]:
        keys = self.data.kv_heads * len(self.data)
        return {
            "build_s": self.build_s,
            "append_s": self.append_s,
            "index_bytes": self.index.nbytes,
            "store_bytes": self.store.nbytes,
            "index_bytes_per_key": self.index.nbytes / keys,
            "heads": list(self.data.heads),
        }

    def build_row(self) -> Row:
        """The time of building the index beside that of dense prefill over the same keys and values.

        The whole prefill would take minutes: its last rows are timed, and the time is scaled by the pairs of queries
        and keys.
        """
        data, keys = self.data, len(self.data)
        rows = min(PREFILL_ROWS, keys)
        asked = np.resize(data.prefill_queries, (rows, data.query_heads, data.head_dim)).astype(self.dtype)
        q = np.ascontiguousarray(asked.transpose(1, 0, 2))
        self.bench.say(f"retrieval on {data.name}, {keys} keys: prefill")

        def prefill() -> Any:
            return la.attention(q, self.store.keys, self.store.values, causal=True)

        prefill()
        seconds = statistics.median(timed(prefill)[0] for _ in range(min(self.bench.rounds, 3)))
        pairs = rows * (2 * keys - rows + 1) / 2
        whole = seconds * (keys * (keys + 1) / 2) / pairs
        return {
            "threads": self.bench.threads,
            "vectors": data.name,
            "shape": f"{data.query_heads}/{data.kv_heads}×{data.head_dim}",
            "keys": keys,
            "build_s": self.build_s,
            "prefill_rows": rows,
            "prefill_rows_s": seconds,
            "prefill_s": whole,
            "build_of_prefill": self.build_s / whole,
        }

    def rows(self, top_ks: list[int], *, with_quality: bool) -> list[Row]:
        """Rows of retrieval with each `top_k`, of exact attention, and of torch."""
        data = self.data
        self.bench.say(f"retrieval on {data.name}, {len(data)} keys: timing")
        names = {top_k: f"longattn.retrieval_attention, top_k {top_k}" for top_k in top_ks}
        candidates = [Candidate(names[top_k], self._rotating(top_k), peer=False) for top_k in top_ks]
        q = np.ascontiguousarray(self.queries[0][:, None])
        keys, values = self.store.keys, self.store.values
        candidates.append(Candidate(EXACT, lambda: la.attention(q, keys, values, causal=True), peer=False))
        if self.bench.peers:
            candidates += [way for way in peers.decode(q[None], keys[None], values[None]) if "repeat" not in way.name]
        rows: list[Row] = []
        for threads in self.bench.each_threads():
            rows += self._timed(candidates, threads)
            scans = {name: self._scan(top_k) for top_k, name in names.items()}
            rows = [row | (scans.get(row["method"], {}) if row["threads"] == threads else {}) for row in rows]
        if with_quality:
            for top_k, name in names.items():
                self.bench.say(f"retrieval on {data.name}, {len(data)} keys: quality at top_k {top_k}")
                found = {"top_k": top_k, **self._quality(top_k)}
                rows = [row | found if row["method"] == name else row for row in rows]
        return rows

    def _scan(self, top_k: int) -> Row:
        """How fast the codes are scanned, with the read bandwidth measured before each call; medians."""
        ask = self._rotating(top_k)
        names = ("scan", "weigh", "select")
        taken: dict[str, list[float]] = {name: [] for name in names}
        read, share, moved = [], [], 0
        for _ in range(self.bench.rounds):
            read.append(self.bench.read_gb_s())
            stats = ask().stats
            assert stats is not None
            # The clusters of the values, a byte a row, are read when rows are weighed.
            moved = int(stats.index_bytes.sum() - stats.keys_scored.sum())
            # Heads are shared out among the threads.
            heads = min(self.bench.threads, stats.scan_seconds.size)
            for name in names:
                taken[name].append(float(getattr(stats, f"{name}_seconds").sum()) / heads)
            share.append(moved / taken["scan"][-1] / 1e9 / read[-1])
        median = {name: statistics.median(seconds) for name, seconds in taken.items()}
        return {
            "scan_mb": moved / 1e6,
            "read_gb_s": statistics.median(read),
            "scan_gb_s": moved / median["scan"] / 1e9,
            "scan_of_read": statistics.median(share),
            **{f"{name}_ms": 1e3 * seconds for name, seconds in median.items()},
            "select_of_scan": median["select"] / median["scan"],
        }

    def _timed(self, candidates: list[Candidate], threads: int) -> list[Row]:
        data = self.data
        outcomes = self.bench.interleave(candidates, burst_s=0.0 if self.bench.quick else BURST_S)
        exact_ms = outcomes[EXACT].median_ms
        torch_ms = [o.median_ms for name, o in outcomes.items() if name.startswith("torch") and not o.failure]
        shape = f"{data.query_heads}/{data.kv_heads}×{data.head_dim}"
        rows = []
        for name, outcome in outcomes.items():
            row: Row = {
                "threads": threads,
                "vectors": data.name,
                "shape": shape,
                "keys": len(data),
                "method": name,
                **outcome.columns(),
            }
            if row["ms"] is not None:
                row["faster_than_exact"] = exact_ms / row["ms"]
                row["faster_than_torch"] = min(torch_ms) / row["ms"] if torch_ms else None
            rows.append(row)
        return rows

    def _retrieve(
        self, query: NDArray[Any], top_k: int, *, rest: Rest = "values", listed: bool = False
    ) -> la.RetrievalResult:
        return la.retrieval_attention(
            query,
            self.store,
            self.index,
            top_k=top_k,
            sinks=self.sinks,
            window=self.window,
            rest=rest,
            return_selected=listed,
        )

    def _rotating(self, top_k: int) -> Callable[[], la.RetrievalResult]:
        """A call that asks the next query each time, so that no selection stays in the caches."""
        rotation = itertools.cycle(np.ascontiguousarray(self.queries[:, :, None]))
        return lambda: self._retrieve(next(rotation), top_k)

    def _quality(self, top_k: int) -> dict[str, Any]:
        def retrieve(query: NDArray[np.float32]) -> quality.Retrieved:
            full = self._retrieve(query[:, None], top_k, listed=True)
            rows_only = self._retrieve(query[:, None], top_k, rest="none")
            assert full.stats is not None
            return quality.Retrieved(
                out=full.out[:, 0],
                out_rows_only=rows_only.out[:, 0],
                selected=[rows for (rows,) in full.stats.selected],
                missed=full.stats.missed_mass[:, 0],
                missed_bound=full.stats.missed_mass_bound[:, 0],
            )

        queries, keys, values = self.queries.astype(np.float32), self.store.keys, self.store.values
        found = {"": [retrieve(query) for query in queries]}
        heads = self.data.heads
        return quality.assess(queries, keys, values, found, sinks=self.sinks, window=self.window, heads=heads)[""]


def _shortened(data: vectors.Vectors, length: int) -> vectors.Vectors:
    return dataclasses.replace(data, keys=data.keys[:, :length], values=data.values[:, :length])


def panels(result: Result) -> list[Panel | Bars]:
    """Time over length, a panel per data set."""
    names = dict.fromkeys(row["vectors"] for row in result["rows"])
    return [
        Panel(f"decode step, {name}", "keys", "ms", series(rows, "keys", "ms"))
        for name in names
        if (rows := [row for row in result["rows"] if row["vectors"] == name])
    ]


def _tables(found: Sequence[Result]) -> list[str]:
    rows = all_rows(found, "retrieval")
    if not rows:
        return []
    scans = [row for row in rows if row.get("scan_gb_s")]
    lines = ["", *table(rows, COLUMNS), "", *table(scans, SCAN_COLUMNS)]
    builds = all_rows(found, "retrieval", "builds")
    return [*lines, "", *table(builds, BUILD_COLUMNS)] if builds else lines


COMMAND = "longattn bench retrieval --top-k 1024 --vectors synthetic,synthetic-flat,synthetic-sharp,lm,minilm"


def _targets() -> list[Target]:
    found = []
    for text, figure, bound, at_most, form in (
        ("speed against torch's best", "faster_than_torch", 10, False, ".2f"),
        ("speed against longattn.attention", "faster_than_exact", 3, False, ".2f"),
        ("mean error, of the rms norm of values", "error_v", 0.025, True, ".3f"),
        ("95th percentile of the error, of the rms norm of values", "error_v_p95", 0.06, True, ".3f"),
        ("scan of codes, share of the read bandwidth", "scan_of_read", 0.7, False, ".0%"),
        ("selection, of the time of the scan", "select_of_scan", 0.3, True, ".0%"),
    ):
        found.append(
            Target(
                f"retrieval over 131,072 keys, {text}",
                "retrieval",
                figure,
                bound,
                COMMAND,
                {"method": ("longattn.retrieval_attention, top_k 1024",)},
                within={"keys": (131_072, 131_072)},
                at_most=at_most,
                form=form,
            )
        )
    found.append(
        Target(
            "retrieval over 131,072 keys, build of the index, of the time of dense prefill",
            "retrieval",
            "build_of_prefill",
            0.05,
            COMMAND,
            within={"keys": (131_072, 131_072)},
            table="builds",
            at_most=True,
            form=".1%",
        )
    )
    return found


SECTIONS = (
    Section(
        "retrieval",
        "retrieval",
        "Retrieval attention: a decode step over codes of all keys",
        "`retrieval_attention` over 4-bit signatures beside exact attention and torch, by data set: time, and error "
        "relative to the norm of the output and to the rms row norm of V. Times are means of calls that follow each "
        "other for 30 ms, as steps do; `first` is the first of them, after another's turn. `rows only`: without the "
        "estimate of the rest. Second table: `scan` reads the codes of every key and scores them; `of read`: bytes of "
        "codes a second over the read bandwidth measured just before; `weigh` sums the scores and turns them into "
        "shares of the mass (where two passes are taken, as always in records before 23 November 2026, the sums "
        "count as `scan`); `select` picks the rows. Times are of the threads' work, spread over the threads. Third: "
        "making the index beside dense prefill of the same keys and values, of which the last rows are timed; the "
        "whole is that time times the ratio of pairs of queries and keys.",
        _tables,
    ),
)

TARGETS = tuple(_targets())
