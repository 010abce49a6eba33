"""Every way to read a part of a store, at equal budgets of rows, on the same queries.

A way is an index with its parameters, or rows that a policy keeps for all queries. All ways read the same sinks and
window and as many rows beside them (the sampling ones as many as they draw, verified ones as many as their promise
takes). The table says what they found, how far
their output is from exact attention, what they read and how long they took.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import longattn as la
from longattn import vectors
from longattn.bench import peers, quality
from longattn.bench.arrays import DTYPES
from longattn.bench.asked import Asked, Built
from longattn.bench.harness import Bench, Candidate, timed
from longattn.bench.plots import Bars, Panel, Scatter
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, grouped, whole
from longattn.bench.stored import empty_store, prepared
from longattn.bench.tables import Column, count, table
from longattn.kv.evict.compressed import CompressedPrompt
from longattn.retrieval.ways import WAYS, Kept, Way, chosen_of_all

SUMMARY = "every way to read a part of a store at equal budgets: what it finds, its error, its time, its index"
COLUMNS: tuple[Column, ...] = (
    Column("vectors", "vectors"),
    Column("keys", "keys"),
    Column("way", "method"),
    Column("rows", "rows_read", ".2%"),
    Column("recall", "recall", ".3f"),
    Column("mass", "mass_read", ".3f"),
    Column("error/‖o‖", "error_o", ".3f"),
    Column("p95", "error_o_p95", ".3f"),
    Column("error/rms‖v‖", "error_v", ".4f"),
    Column("p95", "error_v_p95", ".4f"),
    Column("bytes read", "bytes_read", ".2%"),
    Column("µs/query head", "us", ".1f"),
    Column("vs la.attention", "faster_than_exact", ".1f"),
    Column("vs best torch", "faster_than_torch", ".1f"),
    Column("index B/key", "index_bytes_per_key", ".1f"),
    Column("build s", "build_s", ".2f"),
)
#: Beside the others where the demo was recorded, too.
NEEDLES = Column("needles", "needles", ".2f")
EXACT = "longattn.attention"
SAMPLE = 128  # queries of the prefill that policies judge by
QUICK_LENGTH, QUICK_WINDOW = 4096, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument(
        "--vectors",
        default="real",
        help=f"comma-separated: {', '.join(vectors.names())}; real for the recorded ones, all (default %(default)s)",
    )
    parser.add_argument("--heads", help="KV heads by name, comma-separated (default: the set's choice)")
    parser.add_argument("--ways", help="only those whose name contains one of these, comma-separated")
    parser.add_argument("--length", type=int, default=vectors.LENGTH, help="keys (default %(default)s)")
    parser.add_argument("--rows", type=float, default=0.02, help="share of the rows to read (default %(default)s)")
    parser.add_argument("--groups", type=int, default=16, help="queries (default %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the store (default %(default)s)")
    parser.add_argument("--sinks", type=int, default=4, help="first rows that are always read (default %(default)s)")
    parser.add_argument("--window", type=int, default=64, help="last rows that are always read (default %(default)s)")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Every data set: a row per way and thread count."""
    if not 0 < args.rows < 1:
        raise ValueError(f"--rows: got {args.rows}, expected a share between 0 and 1")
    ways, policies = chosen_of_all(args.ways or "all")
    groups = 3 if bench.quick else args.groups
    window = min(args.window, QUICK_WINDOW) if bench.quick else args.window
    heads = args.heads.split(",") if args.heads else None
    length = min(args.length, QUICK_LENGTH) if bench.quick else args.length
    rows: list[Row] = []
    for name in prepared(bench, _names(args.vectors), asked=args.vectors not in ("real", "all")):
        bench.say(f"compare on {name}, {length} keys: loading")
        data = vectors.load(name, length=length, groups=groups, heads=heads)
        case = _Case(bench, data, args.dtype, args.sinks, window)
        rows += case.at_budget(ways, policies, max(1, round(args.rows * length) - args.sinks - window))
    return {"rows": rows, "slopes": []}


def _names(asked: str) -> Sequence[str]:
    if asked == "real":
        return tuple(vectors.RECORDED)
    return vectors.names() if asked == "all" else asked.split(",")


class _Case:
    """One data set in a store."""

    def __init__(self, bench: Bench, data: vectors.Vectors, dtype: str, sinks: int, window: int) -> None:
        self.bench, self.data = bench, data
        store = empty_store(data, dtype)
        store.append(data.keys, data.values)
        self.asked = Asked(data, store, dtype, sinks, window)

    def at_budget(self, ways: Sequence[Way], policies: Sequence[Kept], top_k: int) -> list[Row]:
        """All ways with `top_k` rows beside sinks and window."""
        built = {way.name: self._built(way) for way in ways}
        kept = {way.name: self._compressed(way, top_k) for way in policies}
        budgets = dict.fromkeys(built, top_k)
        answers = {name: self.asked.ask(way, top_k) for name, way in built.items()}
        answers |= {name: self._ask(way) for name, (way, _) in kept.items()}
        figures = self.asked.compare({name: found for name, (found, _) in answers.items()})
        found = {name: figures[name] | read | {"top_k": top_k} for name, (_, read) in answers.items()}
        for name, way in built.items():
            found[name] |= self._size(way.seconds, way.index.nbytes)
        for name, (compressed, seconds) in kept.items():
            # It holds the rows that it reads: the store beside it could go.
            found[name] |= self._size(seconds, compressed.store.live_bytes)
        candidates = [
            Candidate(name, self.asked.rotating(way, budgets[name]), peer=False) for name, way in built.items()
        ]
        candidates += [Candidate(name, self._attending(way), peer=False) for name, (way, _) in kept.items()]
        return self._rows(candidates, found)

    def _size(self, seconds: float, nbytes: int) -> Row:
        per_key = nbytes / (self.data.kv_heads * len(self.data))
        return {"build_s": seconds, "index_bytes": nbytes, "index_bytes_per_key": per_key}

    def _compressed(self, way: Kept, top_k: int) -> tuple[CompressedPrompt, float]:
        """What a policy keeps, judged by queries of the prefill, and the seconds that it took."""
        self.bench.say(f"compare on {self.data.name}, {len(self.data)} keys: {way.name}")
        asked, every = self.asked, -(-len(self.data.prefill_queries) // SAMPLE)
        sample = np.ascontiguousarray(self.data.prefill_queries[::every].transpose(1, 0, 2))
        rows = top_k + asked.sinks + asked.window

        def choose() -> CompressedPrompt:
            budget = {"rows": rows, "sinks": asked.sinks, "window": asked.window, "room": 1}
            return way.compressed(asked.store.keys, asked.store.values, sample, **budget)

        seconds, made = timed(choose)
        return made, seconds

    def _ask(self, kept: CompressedPrompt) -> tuple[list[quality.Retrieved], dict[str, Any]]:
        """Every query over what is kept: the answers, and the shares of rows and bytes that were read."""
        asked, length = self.asked, len(self.data)
        between = [rows[(rows >= asked.sinks) & (rows < length - asked.window)] for rows in kept.rows]
        nothing = np.zeros(self.data.query_heads, np.float32)
        found = []
        for query in asked.queries:
            out = np.asarray(kept.attend(query[:, None]))[:, 0]
            # A policy makes no estimate of what it misses, and no promise.
            found.append(quality.Retrieved(out, out, between, nothing, nothing + 1))
        share = float(np.mean([len(rows) for rows in kept.rows])) / length
        return found, {"rows_read": share, "bytes_read": share}

    def _attending(self, kept: CompressedPrompt) -> Callable[[], Any]:
        rotation = itertools.cycle(np.ascontiguousarray(self.asked.queries[:, :, None]))
        return lambda: kept.attend(next(rotation))

    def _built(self, way: Way) -> Built:
        self.bench.say(f"compare on {self.data.name}, {len(self.data)} keys: {way.name}")
        return self.asked.build(way)

    def _rows(self, candidates: list[Candidate], found: dict[str, dict[str, Any]]) -> list[Row]:
        data = self.data
        q = np.ascontiguousarray(self.asked.queries[0][:, None])
        keys, values = self.asked.store.keys, self.asked.store.values
        candidates.append(Candidate(EXACT, lambda: la.attention(q, keys, values, causal=True), peer=False))
        if self.bench.peers:
            candidates += [way for way in peers.decode(q[None], keys[None], values[None]) if "repeat" not in way.name]
        rows: list[Row] = []
        for threads in self.bench.each_threads():
            self.bench.say(f"compare on {data.name}, {len(data)} keys: timing")
            outcomes = self.bench.interleave(candidates)
            exact_ms = outcomes[EXACT].median_ms
            torch_ms = [o.median_ms for name, o in outcomes.items() if name.startswith("torch") and not o.failure]
            for name, outcome in outcomes.items():
                row: Row = {"threads": threads, "vectors": data.name, "keys": len(data), "method": name}
                row |= outcome.columns()
                if row["ms"] is not None:
                    row["us"] = 1e3 * row["ms"] / data.query_heads
                    row["faster_than_exact"] = exact_ms / row["ms"]
                    row["faster_than_torch"] = min(torch_ms) / row["ms"] if torch_ms else None
                row |= found.get(name, {})
                rows.append(row)
        return rows


def panels(result: Result) -> list[Panel | Bars | Scatter]:
    """Error over time, a panel per data set and length."""
    drawn: list[Panel | Bars | Scatter] = []
    for (name, keys), rows in grouped(result["rows"], "vectors", "keys").items():
        timed = [row for row in rows if row.get("ms") and row.get("error_v") is not None]
        points = {row["method"]: (row["us"], row["error_v"]) for row in timed}
        drawn.append(Scatter(f"{name}, {keys} keys", "µs per query head", "mean error / rms ‖v‖", points))
    return drawn


def _needles(found: Sequence[Result]) -> dict[str, float]:
    """Accuracy of the demo's model through each way, of exact attention's, over the longest text that was recorded."""
    rows = [row for row in all_rows(found, "demo") if row.get("accuracy_of_exact") is not None]
    longest = max((row["keys"] for row in rows), default=0)
    ours = {"retrieval": WAYS[0].name, "exact": EXACT}
    names = {name: ours.get(name, name) for name in (str(row["method"]) for row in rows)}
    return {names[row["method"]]: row["accuracy_of_exact"] for row in rows if row["keys"] == longest}


def _tables(found: Sequence[Result]) -> list[str]:
    lines: list[str] = []
    needles = _needles(found)
    columns = (*COLUMNS[2:], NEEDLES) if needles else COLUMNS[2:]
    for (name, keys, threads), mine in grouped(all_rows(found, "compare"), "vectors", "keys", "threads").items():
        mine.sort(key=lambda row: row.get("error_v") or 0)
        joined = [row | {"needles": needles.get(row["method"])} for row in mine]
        lines += ["", f"{name}, {keys} keys, {count(threads)}:", "", *table(joined, columns)]
    return lines


SECTIONS = (
    Section(
        "retrieval",
        "compare",
        "Ways to read a part of the store",
        "Every way of `longattn compare` at the same budget of rows, sinks and window among them (LSH tables read what "
        "they draw, verified ways what their promise takes), on one set of queries, by their error. `recall`: share of "
        "the query group's best rows among those selected; `mass`: share of the softmax mass in the rows read; `bytes "
        "read`: rows and index, of all keys and values. `needles`: of the demo, over its longest text and with its own "
        "`--top-k`: the accuracy of its model through the same way, of that with exact attention.",
        _tables,
        whole("compare", panels),
    ),
)
