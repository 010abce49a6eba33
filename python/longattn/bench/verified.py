"""Budgets of error: how often the output is further off than promised, what that reads, and how long it takes.

Every data set is measured in its own shape. A violation is an output of one query head whose error exceeds epsilon.
Sets with too few queries are asked again with other seeds, which draw other rows.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn import vectors
from longattn.bench.arrays import DTYPES
from longattn.bench.harness import Bench, Candidate
from longattn.bench.plots import Bars, Panel, Points
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, whole
from longattn.bench.stored import empty_store, prepared
from longattn.bench.tables import Column, table
from longattn.bench.targets import Target

SUMMARY = "attention with a promised error: violations, rows read and time against epsilon"
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("vectors", "vectors"),
    Column("Hq/Hkv×D", "shape"),
    Column("keys", "keys"),
    Column("relative to", "relative_to"),
    Column("epsilon", "epsilon"),
    Column("delta", "delta"),
    Column("outputs", "outputs"),
    Column("of queries", "queries"),
    Column("violations", "violations", ".4%"),
    Column("error/epsilon at 1 - delta", "error_quantile", ".2f"),
    Column("largest", "error_largest", ".2f"),
    Column("rows read", "rows", ".2%"),
    Column("p95", "rows_p95", ".2%"),
    Column("all read", "dense", ".1%"),
    Column("ms", "ms", ".3g"),
    Column("min", "ms_min", ".3g"),
    Column("max", "ms_max", ".3g"),
    Column("vs la.attention", "faster_than_exact", ".1f"),
)
EXACT = "longattn.attention"
Unit = Literal["output", "values"]
EPSILONS: dict[Unit, tuple[float, ...]] = {"output": (0.05, 0.1, 0.2), "values": (0.02, 0.05, 0.1)}
DELTAS = (0.05, 0.01)
QUICK_LENGTH, QUICK_WINDOW, QUICK_OUTPUTS = 16_384, 64, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument("--vectors", help=f"comma-separated: {', '.join(vectors.names())} (default all)")
    parser.add_argument("--heads", help="KV heads by name, comma-separated (default: the set's choice)")
    parser.add_argument("--bits", type=int, default=4, help="of the signatures (default %(default)s)")
    parser.add_argument("--length", type=int, default=vectors.LENGTH, help="keys (default %(default)s)")
    parser.add_argument(
        "--outputs", type=int, default=10_000, help="outputs per setting, at least (default %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bfloat16", help="of keys and values (default %(default)s)"
    )
    parser.add_argument("--sinks", type=int, default=4, help="first rows that are always read (default %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="last rows that are always read (default %(default)s)")


@dataclass(frozen=True)
class Budget:
    """One promise."""

    relative_to: Unit
    epsilon: float
    delta: float

    def __str__(self) -> str:
        return f"longattn.verified_sparse_attention, {self.relative_to} {self.epsilon}, delta {self.delta}"


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Every data set with every budget."""
    names = args.vectors.split(",") if args.vectors else (["synthetic"] if bench.quick else list(vectors.names()))
    length = min(args.length, QUICK_LENGTH) if bench.quick else args.length
    window = min(args.window, QUICK_WINDOW) if bench.quick else args.window
    outputs = min(args.outputs, QUICK_OUTPUTS) if bench.quick else args.outputs
    budgets = [Budget(unit, e, delta) for unit, epsilons in EPSILONS.items() for e in epsilons for delta in DELTAS]
    heads = args.heads.split(",") if args.heads else None
    rows: list[Row] = []
    for name in prepared(bench, names, asked=bool(args.vectors)):
        bench.say(f"verified on {name}, {length} keys: loading")
        data = _load(name, length, outputs, heads)
        case = _Case(bench, data, args.dtype, args.bits, args.sinks, window)
        found = {str(budget): case.promise(budget, outputs) for budget in budgets}
        for threads in bench.each_threads():
            rows += [row | found[row["method"]] for row in case.timed(budgets, threads)]
    return {"rows": rows, "slopes": []}


def _load(name: str, length: int, outputs: int, heads: list[str] | None) -> vectors.Vectors:
    """The set with enough groups for `outputs`, or with all it has."""
    one = vectors.load(name, length=length, groups=1, heads=heads)
    groups = -(-outputs // one.query_heads)
    if name in vectors.RECORDED:
        groups = min(groups, vectors.RECORDED[name].open().groups)
    return vectors.load(name, length=length, groups=groups, heads=heads)


class _Case:
    """One data set in a store with its index, and what exact attention makes of its queries."""

    def __init__(self, bench: Bench, data: vectors.Vectors, dtype: str, bits: int, sinks: int, window: int) -> None:
        self.bench, self.data, self.sinks, self.window = bench, data, sinks, window
        self.store = empty_store(data, dtype)
        self.store.append(data.keys, data.values)
        self.index = la.index.Signatures(self.store, bits=bits)
        self.index.update()
        self.queries = data.queries
        # All see all rows: one call without causality.
        together = np.ascontiguousarray(self.queries.swapaxes(0, 1))
        self.exact = la.attention(together, self.store.keys, self.store.values).swapaxes(0, 1).astype(np.float64)
        norms = [np.sqrt(np.mean(np.sum(np.asarray(v, np.float64) ** 2, -1))) for v in self.store.values]
        self.units = {
            "output": np.linalg.norm(self.exact, axis=-1),
            "values": np.repeat(norms, data.group)[None],
        }

    def ask(self, query: NDArray[np.float32], budget: Budget, seed: int = 0) -> la.RetrievalResult:
        return la.retrieval_attention(
            query[:, None],
            self.store,
            self.index,
            epsilon=budget.epsilon,
            delta=budget.delta,
            relative_to=budget.relative_to,
            seed=seed,
            sinks=self.sinks,
            window=self.window,
        )

    def promise(self, budget: Budget, outputs: int) -> dict[str, Any]:
        """How a budget is kept over all queries, each with as many seeds as it takes."""
        data = self.data
        self.bench.say(f"verified on {data.name}, {len(data)} keys: {budget}")
        seeds = -(-outputs // self.exact[..., 0].size)
        errors, read, verified = [], [], []
        for seed in range(seeds):
            for query, exact in zip(self.queries, self.exact, strict=True):
                result = self.ask(query, budget, seed)
                assert result.stats is not None
                errors.append(np.linalg.norm(result.out[:, 0] - exact, axis=-1))
                read.append(result.stats.keys_attended[:, 0])
                verified.append(result.stats.verified[:, 0])
        units = np.broadcast_to(self.units[budget.relative_to], (len(self.queries), data.query_heads))
        relative = np.stack(errors) / np.tile(units, (seeds, 1)) / budget.epsilon
        share = np.stack(read) / len(data)
        return {
            "relative_to": budget.relative_to,
            "epsilon": budget.epsilon,
            "delta": budget.delta,
            "outputs": relative.size,
            "queries": self.exact[..., 0].size,
            "violations": float((relative > 1).mean()),
            "violations_over_delta": float((relative > 1).mean()) / budget.delta,
            "error_quantile": float(np.quantile(relative, 1 - budget.delta)),
            "error_largest": float(relative.max()),
            "rows": float(share.mean()),
            "rows_p95": float(np.quantile(share, 0.95)),
            "dense": 1 - float(np.stack(verified).mean()),
        }

    def timed(self, budgets: list[Budget], threads: int) -> list[Row]:
        """A row per budget: its time beside that of exact attention."""
        data = self.data
        self.bench.say(f"verified on {data.name}, {len(data)} keys: timing")
        q, keys, values = np.ascontiguousarray(self.queries[0][:, None]), self.store.keys, self.store.values
        candidates = [Candidate(str(budget), self._rotating(budget), peer=False) for budget in budgets]
        candidates.append(Candidate(EXACT, lambda: la.attention(q, keys, values, causal=True), peer=False))
        outcomes = self.bench.interleave(candidates)
        case = {
            "threads": threads,
            "vectors": data.name,
            "shape": f"{data.query_heads}/{data.kv_heads}×{data.head_dim}",
            "keys": len(data),
        }
        exact_ms = outcomes[EXACT].median_ms
        return [
            {
                **case,
                "method": str(budget),
                **outcomes[str(budget)].columns(),
                "faster_than_exact": exact_ms / outcomes[str(budget)].median_ms,
            }
            for budget in budgets
        ]

    def _rotating(self, budget: Budget) -> Callable[[], la.RetrievalResult]:
        """A call that asks the next query each time, so that no sample stays in the caches."""
        rotation = itertools.cycle(self.queries)
        return lambda: self.ask(next(rotation), budget)


def panels(result: Result) -> list[Panel | Bars]:
    """Rows read, violations and time over epsilon, a row of panels per unit of the error and a line per set."""
    figures = (("rows", "share of rows read"), ("violations", "share of violations"), ("ms", "ms"))
    drawn: list[Panel | Bars] = []
    threads = result["rows"][0]["threads"]
    for unit in EPSILONS:
        for figure, label in figures:
            lines: dict[str, Points] = {}
            for row in result["rows"]:
                if row["relative_to"] == unit and row["threads"] == threads:
                    lines.setdefault(f"{row['vectors']}, delta {row['delta']}", []).append(
                        (row["epsilon"], row[figure])
                    )
            log = figure != "violations"
            limit = None if log else max(DELTAS)
            drawn.append(Panel(f"{label}, error relative to {unit}", "epsilon", label, lines, log_y=log, limit=limit))
    return drawn


def _tables(found: Sequence[Result]) -> list[str]:
    rows = all_rows(found, "verified")
    return ["", *table(rows, COLUMNS)] if rows else []


SECTIONS = (
    Section(
        "retrieval",
        "verified",
        "Stated errors",
        "`retrieval_attention` with `epsilon` and `delta` over many queries: how often the error was larger than "
        "stated, what was read for it, and how often everything was.",
        _tables,
        whole("verified", panels),
    ),
)
TARGETS = (
    Target(
        "stated errors: share of violations over delta",
        "verified",
        "violations_over_delta",
        1.0,
        "longattn bench verified",
        at_most=True,
    ),
    Target(
        "stated errors: outputs per setting",
        "verified",
        "queries",
        10_000,
        "longattn bench verified",
        form=",.0f",
    ),
)
