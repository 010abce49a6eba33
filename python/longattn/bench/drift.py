"""How an index keeps up with what is generated: what it finds behind the prefill, and tens of thousands of rows later.

An index is made over the prefill. Then rows come a few at a time, and the index follows. At both times the same
number of queries ask for the same share of the rows; at the second, an index that is built anew over all rows is
asked beside the one that grew. Generated rows may be about something else than the prefill (`vectors.generation`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from longattn import vectors
from longattn.bench.arrays import DTYPES
from longattn.bench.asked import Asked, Built
from longattn.bench.harness import Bench, timed
from longattn.bench.plots import Bars, Panel, Scatter
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, grouped, whole
from longattn.bench.stored import empty_store, prepared
from longattn.bench.tables import Column, table
from longattn.bench.targets import Target
from longattn.retrieval.ways import WAYS, Way, chosen

SUMMARY = "what an index finds after tens of thousands of generated rows, against what it found behind the prefill"
COLUMNS: tuple[Column, ...] = (
    Column("vectors", "vectors"),
    Column("prefill", "prefill"),
    Column("keys", "keys"),
    Column("way", "method"),
    Column("rows", "rows_read", ".2%"),
    Column("recall: start", "recall_start", ".3f"),
    Column("end", "recall_end", ".3f"),
    Column("built anew", "recall_anew", ".3f"),
    Column("change", "recall_change", "+.3f"),
    Column("kept: start", "kept_start", ".3f"),
    Column("end", "kept_end", ".3f"),
    Column("built anew", "kept_anew", ".3f"),
    Column("change", "kept_change", "+.3f"),
    Column("error/rms‖v‖: start", "error_v_start", ".4f"),
    Column("end", "error_v_end", ".4f"),
    Column("growing, µs/row", "grow_us", ".1f"),
    Column("build s", "build_s", ".2f"),
)
SETS = ("synthetic", "synthetic-flat", "minilm", "lm")
GENERATED = 32_768
QUICK_LENGTH, QUICK_GENERATED, QUICK_WINDOW = 8192, 2048, 64
DRAWN = 6  # ways in a plot
FIGURES = {"recall": "recall", "kept": "selected_kept_shared", "error_v": "error_v"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument("--vectors", help=f"comma-separated: {', '.join(SETS)} (default all)")
    parser.add_argument("--heads", help="KV heads by name, comma-separated (default: the set's choice)")
    parser.add_argument("--ways", help="only those whose name contains one of these, comma-separated")
    parser.add_argument(
        "--length", type=int, default=vectors.LENGTH, help="keys, generated ones included (default %(default)s)"
    )
    parser.add_argument(
        "--generated", type=int, default=GENERATED, help="rows behind the prefill (default %(default)s)"
    )
    parser.add_argument("--step", type=int, default=16, help="rows that come at a time (default %(default)s)")
    parser.add_argument("--rows", type=float, default=0.02, help="share of the rows to read (default %(default)s)")
    parser.add_argument("--groups", type=int, default=48, help="queries at either time (default %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the store (default %(default)s)")
    parser.add_argument("--sinks", type=int, default=4, help="first rows that are always read (default %(default)s)")
    parser.add_argument("--window", type=int, default=64, help="last rows that are always read (default %(default)s)")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Every data set: a row per way."""
    if not 0 < args.rows < 1:
        raise ValueError(f"--rows: got {args.rows}, expected a share between 0 and 1")
    if args.step < 1:
        raise ValueError(f"--step: got {args.step}, expected at least 1")
    length, generated, groups = args.length, args.generated, args.groups
    if bench.quick:
        length, generated, groups = min(length, QUICK_LENGTH), min(generated, QUICK_GENERATED), min(groups, 6)
    ways = _distinct(chosen(args.ways) if args.ways else WAYS)
    heads = args.heads.split(",") if args.heads else None
    rows: list[Row] = []
    for name in prepared(bench, args.vectors.split(",") if args.vectors else SETS, asked=bool(args.vectors)):
        bench.say(f"drift on {name}, {length} keys: loading")
        text = vectors.generation(name, prefill=length - generated, length=length, groups=groups, heads=heads)
        window = min(args.window, QUICK_WINDOW) if bench.quick else args.window
        rows += _Case(bench, text, args.dtype, args.sinks, window, args.rows).rows(ways, args.step)
    return {"rows": rows, "slopes": []}


def _distinct(ways: Sequence[Way]) -> list[Way]:
    """One way of each index: what is done with the rest does not change what is found."""
    found: dict[str, Way] = {}
    for way in ways:
        found.setdefault(f"{way.kind} {dict(way.parameters)} {way.queries}", way)
    return list(found.values())


class _Case:
    """One sequence: its prefill in a store, the rest to come."""

    def __init__(
        self, bench: Bench, text: vectors.Generation, dtype: str, sinks: int, window: int, share: float
    ) -> None:
        self.bench, self.text, self.share = bench, text, share
        self.asked = Asked(text.data, empty_store(text.data, dtype), dtype, sinks, window)
        self.dtype = DTYPES[dtype]

    def rows(self, ways: Sequence[Way], step: int) -> list[Row]:
        """A row per way."""
        asked, text = self.asked, self.text
        self._append(0, text.prefill)
        built = {way.name: self._built(way, "the prefill") for way in ways}
        start = self._found(built, text.first_queries)
        seconds = self._grown(built, step)
        end = self._found(built, text.data.queries)
        # One after the other: indexes built anew are only asked once.
        anew = {way.name: self._found({way.name: self._built(way, "all rows")}, text.data.queries) for way in ways}
        rows: list[Row] = []
        for name, way in built.items():
            row: Row = {
                "threads": self.bench.threads,
                "vectors": text.data.name,
                "prefill": text.prefill,
                "keys": len(text.data),
                "method": name,
                "rows_read": end[name]["rows_read"],
                "grow_us": 1e6 * seconds[name] / (len(text.data) - text.prefill),
                "build_s": way.seconds,
                "index_bytes": way.index.nbytes,
                "store_bytes": asked.store.nbytes,
            }
            for figure, key in FIGURES.items():
                times = {"start": start[name], "end": end[name], "anew": anew[name][name]}
                row |= {f"{figure}_{time}": found[key] for time, found in times.items()}
                row[f"{figure}_change"] = row[f"{figure}_end"] - row[f"{figure}_start"]
            rows.append(row)
        return rows

    def _built(self, way: Way, of: str) -> Built:
        self.bench.say(f"drift on {self.text.data.name}: {way.name} over {of}")
        return self.asked.build(way)

    def _append(self, first: int, last: int) -> None:
        data = self.text.data
        self.asked.store.append(data.keys[:, first:last], data.values[:, first:last])

    def _found(self, built: dict[str, Built], queries: np.ndarray[Any, Any]) -> dict[str, dict[str, Any]]:
        """What the ways find of the rows that are there."""
        asked = self.asked
        asked.queries = queries.astype(self.dtype)
        top_k = max(1, round(self.share * len(asked.store)) - asked.sinks - asked.window)
        return asked.assess(built, dict.fromkeys(built, top_k))

    def _grown(self, built: dict[str, Built], step: int) -> dict[str, float]:
        """Lets the rest come, and says how long each index took to follow."""
        data, seconds = self.text.data, dict.fromkeys(built, 0.0)
        self.bench.say(f"drift on {data.name}: {len(data) - self.text.prefill} rows come, {step} at a time")
        for first in range(self.text.prefill, len(data), step):
            self._append(first, min(first + step, len(data)))
            for name, way in built.items():
                seconds[name] += timed(way.index.update)[0]
        return seconds


def panels(result: Result) -> list[Panel | Bars | Scatter]:
    """Recall at the start, at the end and of an index built anew, a panel per data set of what finds most."""
    drawn: list[Panel | Bars | Scatter] = []
    for (name,), mine in grouped(result["rows"], "vectors").items():
        rows = sorted(mine, key=lambda row: -row["recall_end"])[:DRAWN]
        bars: dict[str, tuple[float | None, ...]] = {
            label: tuple(row[f"recall_{time}"] for row in rows)
            for label, time in (("behind the prefill", "start"), ("at the end", "end"), ("built anew", "anew"))
        }
        labels = tuple(row["method"].replace(", ", "\n").replace(" ", "\n") for row in rows)
        drawn.append(Bars(f"recall, {name}", "recall", labels, bars))
    return drawn


def _tables(found: Sequence[Result]) -> list[str]:
    lines: list[str] = []
    for (name, first, keys), mine in grouped(all_rows(found, "drift"), "vectors", "prefill", "keys").items():
        mine.sort(key=lambda row: -row["recall_end"])
        lines += ["", f"{name}, a prefill of {first} keys and {keys - first} behind it:", ""]
        lines += table(mine, COLUMNS[3:])
    return lines


SECTIONS = (
    Section(
        "retrieval",
        "drift",
        "Drift: an index that grows",
        "An index over a prefill, and what it finds when as many rows came behind it as stated, a few at a time; "
        "beside it one that was built anew over all rows. Synthetic text changes its subject where the prefill ends, "
        "and the last queries ask about the new one; recorded text goes on as it is. `recall`: share of the query "
        "group's best rows among those selected; `kept`: their mass over that of the best set of as many; `growing`: "
        "time to follow the store, per row, all heads together.",
        _tables,
        whole("drift", panels),
    ),
)
TARGETS = (
    Target(
        "drift: recall of the default index after 32K generated rows, less that behind the prefill",
        "drift",
        "recall_change",
        -0.02,
        "longattn bench drift",
        {"method": (WAYS[0].name,)},
        form="+.3f",
    ),
)
