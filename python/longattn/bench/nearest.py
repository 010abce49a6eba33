"""Nearest-neighbour libraries beside our ways: time per query head at equal softmax mass, on one KV head.

A peer indexes the keys of one head under the inner product and is asked by each query head by itself, one query a
call, on one thread, as their users do. Ours are asked once for the query group, and their time, divided by the heads
of the group, holds the attention over what is found as well; the peers' is the search alone.

A level is a share of the mass that each query head's own 100 best keys hold, which a search for 100 neighbours can
reach at most. What is compared are the fastest settings that reach a level in the mean.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn import vectors
from longattn.bench import quality
from longattn.bench.arrays import DTYPES
from longattn.bench.external import run_script
from longattn.bench.harness import Bench, Candidate, timed
from longattn.bench.options import add_common
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows
from longattn.bench.stored import prepared
from longattn.bench.tables import Column, table
from longattn.bench.targets import Target
from longattn.retrieval.ways import WAYS, Way

ROUTINE = "nearest-peer"
COLUMNS: tuple[Column, ...] = (
    Column("vectors", "vectors"),
    Column("head", "head"),
    Column("keys", "keys"),
    Column("index", "method"),
    Column("setting", "setting"),
    Column("rows", "found", ".0f"),
    Column("mass", "mass", ".3f"),
    Column("of own best 100", "kept", ".3f"),
    Column("µs/query head", "us", ".1f"),
    Column("min", "us_min", ".1f"),
    Column("max", "us_max", ".1f"),
    Column("build s", "build_s", ".2f"),
)
LEVEL_COLUMNS: tuple[Column, ...] = (
    Column("vectors", "vectors"),
    Column("head", "head"),
    Column("of own best 100", "level", ".0%"),
    Column("peer", "peer"),
    Column("setting", "peer_setting"),
    Column("µs/query head", "peer_us", ".1f"),
    Column("ours, default: µs", "ours_us", ".1f"),
    Column("setting", "ours_setting"),
    Column("× ours", "times_ours", ".1f"),
    Column("ours, fastest: µs", "fastest_us", ".1f"),
    Column("way", "fastest"),
    Column("× fastest", "times_fastest", ".1f"),
    Column("peer's build s", "peer_build_s", ".2f"),
    Column("ours, default", "ours_build_s", ".2f"),
    Column("not reached", "missing"),
)
BEST = 100
LEVELS = (0.8, 0.9, 0.95, 0.99)
OURS = ("signatures, 4 bits", "signatures, 2 bits", "clusters of 16", "inverted lists", "pages of 16, means")
TOP_KS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SETS = ("synthetic", "synthetic-flat", "minilm", "lm")
QUICK_LENGTH, QUICK_GROUPS = 8192, 4

Rows = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Search:
    """One setting of a built index: what it is called, and the rows that it finds for one query `[D]`."""

    setting: str
    rows: Callable[[NDArray[np.float32]], Rows]


@dataclass(frozen=True)
class Peer:
    """A library's index: its name, and a function from keys `[N, D]` and threads for building to its settings."""

    name: str
    build: Callable[[NDArray[np.float32], int], Sequence[Search]]


def parser() -> argparse.ArgumentParser:
    """The options of a script."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(made)
    made.add_argument("--vectors", default=",".join(SETS), help="comma-separated (default %(default)s)")
    made.add_argument("--heads", help="KV heads by name, comma-separated (default: the first that the set chooses)")
    made.add_argument("--length", type=int, default=vectors.LENGTH, help="keys (default %(default)s)")
    made.add_argument("--groups", type=int, default=32, help="queries of the group (default %(default)s)")
    made.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of our store (default %(default)s)")
    made.add_argument("--only", help="only peers with one of these in their name, comma-separated")
    return made


Load = Callable[[], tuple[dict[str, str], Sequence[Peer]]]
"""Imports the peers and returns their versions and their indexes; raises `ModuleNotFoundError`, with a message that
says what to do, where one is not installed."""


def main(name: str, load: Load, argv: Sequence[str] | None = None) -> int:
    """Runs a script: measures, prints the table, writes the JSON.

    Args:
        name: what messages begin with.
        load: gives the peers.
        argv: arguments; `None` is the command line's.

    Returns:
        Exit status: 0, 2 for bad options or peers that are not there, 130 after Ctrl-C.
    """
    args = parser().parse_args(argv)

    def work(bench: Bench) -> dict[str, Any]:
        versions, found = load()
        wanted = args.only.split(",") if args.only else [""]
        chosen = [peer for peer in found if any(part in peer.name for part in wanted)]
        if not chosen:
            raise ValueError(f"--only: got {args.only}, expected part of one of {'; '.join(p.name for p in found)}")
        bench.notes.append(", ".join(f"{package} {version}" for package, version in versions.items()))
        return measure(bench, args, chosen) | {"versions": versions}

    return run_script(name, args, argv, ROUTINE, COLUMNS, work)


def measure(bench: Bench, args: argparse.Namespace, peers: Sequence[Peer]) -> dict[str, Any]:
    """Every head: `rows`, one for each setting of each index, and `levels`, one for each level and peer."""
    # Searches have one thread; a script that is given several counts builds with the largest.
    builders = max(args.threads) if args.threads else len(os.sched_getaffinity(0))
    length, groups = args.length, args.groups
    if bench.quick:
        length, groups = min(length, QUICK_LENGTH), min(groups, QUICK_GROUPS)
    rows: list[Row] = []
    levels: list[Row] = []
    for name in prepared(bench, args.vectors.split(","), asked=args.vectors != ",".join(SETS)):
        for head in args.heads.split(",") if args.heads else [_first_head(name)]:
            bench.say(f"{name}, head {head}, {length} keys: loading")
            data = vectors.load(name, length=length, groups=groups, heads=[head])
            found = _Head(bench, data, args.dtype, builders).rows(peers)
            rows += found
            levels += at_levels(found)
    return {"rows": rows, "levels": levels, "slopes": [], "build_threads": builders}


def _first_head(name: str) -> str:
    if name in vectors.RECORDED:
        return vectors.RECORDED[name].open().default_heads[0]
    return "0"


class _Head:
    """One KV head, the query heads of its group, and what their softmax gives each key."""

    def __init__(self, bench: Bench, data: vectors.Vectors, dtype: str, builders: int) -> None:
        self.bench, self.data, self.builders = bench, data, builders
        self.keys = np.ascontiguousarray(data.keys[0])
        self.store = la.KVStore(1, data.head_dim, data.values.shape[2], dtype, capacity=len(data))
        self.store.append(data.keys, data.values)
        self.queries = data.queries
        flat = self.queries.reshape(-1, data.head_dim)
        self.weights = quality.exact(flat, self.keys, data.values[0]).weights
        own = np.partition(self.weights, -BEST, -1)[:, -BEST:].sum(-1)
        self.best_mass = float(own.mean())
        self.dtype = DTYPES[dtype]

    def rows(self, peers: Sequence[Peer]) -> list[Row]:
        """A row per setting."""
        settings: dict[str, tuple[Row, Callable[[], Any]]] = {}
        for way in WAYS:
            if way.name in OURS:
                settings |= self._ours(way)
        for peer in peers:
            self.bench.say(f"{self.data.name}, head {self.data.heads[0]}: building {peer.name}")
            seconds, searches = timed(partial(peer.build, self.keys, self.builders))
            for search in searches:
                row = {"peer": peer.name, "method": peer.name, "setting": search.setting, "build_s": seconds}
                settings[f"{peer.name}, {search.setting}"] = row | self._of_peer(search), self._calls(search)
        self.bench.use(1)
        self.bench.say(f"{self.data.name}, head {self.data.heads[0]}: timing {len(settings)} settings")
        outcomes = self.bench.interleave(
            [Candidate(name, call, peer="peer" in row) for name, (row, call) in settings.items()]
        )
        asked = len(self.queries) * self.data.group
        case = {
            "threads": 1,
            "vectors": self.data.name,
            "head": self.data.heads[0],
            "keys": len(self.data),
            "head_dim": self.data.head_dim,
        }
        rows: list[Row] = []
        for name, (row, _) in settings.items():
            figures = outcomes[name].columns()
            times = {
                f"us{part}": None if figures[f"ms{part}"] is None else 1e3 * figures[f"ms{part}"] / asked
                for part in ("", "_min", "_max")
            }
            rows.append(case | row | times | {"calls": figures["calls"], "failure": figures.get("failure")})
        return rows

    def _ours(self, way: Way) -> dict[str, tuple[Row, Callable[[], Any]]]:
        self.bench.say(f"{self.data.name}, head {self.data.heads[0]}: building {way.name}")
        self.bench.use(self.builders)
        prefill = np.ascontiguousarray(self.data.prefill_queries.transpose(1, 0, 2)) if way.queries else None

        def made() -> la.index.Index:
            index = way.index(self.store, prefill)
            index.update()
            return index

        seconds, index = timed(made)
        queries = np.ascontiguousarray(self.queries[:, :, None]).astype(self.dtype)
        found: dict[str, tuple[Row, Callable[[], Any]]] = {}
        for top_k in TOP_KS:
            if top_k > len(self.data) // 4:
                break

            def ask(query: NDArray[Any], top_k: int = top_k, listed: bool = False) -> la.RetrievalResult:
                return la.retrieval_attention(
                    query, self.store, index, top_k=top_k, sinks=0, window=0, rest="none", return_selected=listed
                )

            def all_queries(ask: Callable[..., Any] = ask) -> None:
                for query in queries:
                    ask(query)

            mass = []
            for i, query in enumerate(queries):
                stats = ask(query, listed=True).stats
                assert stats is not None  # one query
                mine = self.weights[i * self.data.group : (i + 1) * self.data.group]
                mass.append(mine[:, stats.selected[0][0]].sum(-1))
            row = {
                "method": way.name,
                "setting": f"top_k {top_k}",
                "default": way is WAYS[0],
                "build_s": seconds,
                **self._kept(np.concatenate(mass)),
                "found": top_k,
            }
            found[f"longattn {way.name}, {top_k}"] = row, all_queries
        return found

    def _of_peer(self, search: Search) -> Row:
        flat = self.queries.reshape(-1, self.data.head_dim)
        found = [np.asarray(search.rows(query)) for query in flat]
        found = [rows[(rows >= 0) & (rows < len(self.data))] for rows in found]
        mass = [weights[rows].sum() for weights, rows in zip(self.weights, found, strict=True)]
        return self._kept(np.array(mass)) | {"found": float(np.mean([len(rows) for rows in found]))}

    def _kept(self, mass: NDArray[np.float64]) -> Row:
        return {"mass": float(mass.mean()), "kept": float(mass.mean() / self.best_mass)}

    def _calls(self, search: Search) -> Callable[[], None]:
        flat = self.queries.reshape(-1, self.data.head_dim)

        def call() -> None:
            for query in flat:
                search.rows(query)

        return call


def at_levels(rows: Sequence[Row]) -> list[Row]:
    """Of rows of one head, the fastest setting of each peer, of our default and of all of ours, at each level."""
    found: list[Row] = []
    peers = dict.fromkeys(row["peer"] for row in rows if "peer" in row)
    for level in LEVELS:
        default = _fastest([row for row in rows if row.get("default")], level)
        ours = _fastest([row for row in rows if "peer" not in row], level)
        for peer in peers:
            mine = [row for row in rows if row.get("peer") == peer]
            theirs = _fastest(mine, level)
            line: Row = {key: mine[0][key] for key in ("threads", "vectors", "head", "keys", "head_dim")}
            line |= {"level": level, "peer": peer, "peer_build_s": mine[0]["build_s"], "missing": ""}
            if theirs:
                line |= {"peer_us": theirs["us"], "peer_setting": theirs["setting"]}
            else:
                line["missing"] = f"the peer: {max(row['kept'] for row in mine):.3f} at most"
            if default:
                line |= {"ours_us": default["us"], "ours_setting": default["setting"]}
                line["ours_build_s"] = default["build_s"]
            if ours:
                line |= {"fastest_us": ours["us"], "fastest": f"{ours['method']}, {ours['setting']}"}
            if theirs and default:
                line["times_ours"] = theirs["us"] / default["us"]
            if theirs and ours:
                line["times_fastest"] = theirs["us"] / ours["us"]
            found.append(line)
    return found


def _fastest(rows: Sequence[Row], level: float) -> Row | None:
    reach = [row for row in rows if row["kept"] >= level and row.get("us") is not None]
    return min(reach, key=lambda row: float(row["us"])) if reach else None


def _tables(found: Sequence[Result]) -> list[str]:
    rows = all_rows(found, ROUTINE, "levels")
    return ["", *table(rows, LEVEL_COLUMNS)] if rows else []


SECTIONS = (
    Section(
        "retrieval",
        "nearest",
        "Beside nearest-neighbour libraries",
        "Made by `benches/peers/ann.py`: one KV head, searches of one thread, a query a call. A peer is asked by each "
        "query head for its 100 or 400 nearest keys; ours are asked once for the query group, and their time, divided "
        "by the heads of the group, holds the attention over the rows found, the peers' does not. `of own best 100`: "
        "mass found over that of each query head's own 100 best keys; of each index the fastest setting that reaches "
        "it in the mean.",
        _tables,
    ),
)
TARGETS = tuple(
    Target(
        f"time of {peer} per query head over that of the default way, at equal mass",
        ROUTINE,
        "times_ours",
        3.0,
        "python benches/peers/ann.py",
        {"peer": (peer,)},
        table="levels",
    )
    for peer in ("faiss IVF", "faiss HNSW", "faiss binary flat", "hnswlib", "usearch")
)
