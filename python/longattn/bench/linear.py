"""Recurrences of matrix states: prefill, bound by arithmetic, and decode steps, bound by reading and writing the state.

GFLOP/s counts, per row and head, `4 D^2` operations (read and update of the state), with the delta rule `6 D^2`, and
128 D (with the delta rule 320 D) for rows of a chunk of 64 with each other, however large the chunks really are.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import longattn as la
from longattn import linear
from longattn.bench import linear_peers
from longattn.bench.arrays import DTYPES, gaussian
from longattn.bench.harness import Bench, Candidate, rows_of, slopes
from longattn.bench.options import Grid, add_grid, chosen_grid
from longattn.bench.peers import to_numpy
from longattn.bench.plots import Bars, Panel, series
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, titled, values_of, whole
from longattn.bench.tables import Column, count, table
from longattn.bench.targets import Target

SUMMARY = "linear attention and recurrences: prefill and decode step, against torch's loops and our own attention"
ATTENTION = "longattn.attention"
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("form", "form"),
    Column("H", "query_heads"),
    Column("D", "head_dim"),
    Column("batch", "batch"),
    Column("length", "keys"),
    Column("dtype", "dtype"),
    Column("method", "method"),
    Column("ms", "ms", ".3g"),
    Column("min", "ms_min", ".3g"),
    Column("max", "ms_max", ".3g"),
    Column("calls", "calls"),
    Column("GFLOP/s", "gflop_s", ".3g"),
    Column("of FMA", "of_fma", ".0%"),
    Column("GB/s of state", "gb_s", ".3g"),
    Column("of read", "of_read", ".0%"),
    Column("× ours", "times_ours", ".2f"),
    Column("vs chunk loop", "vs_chunks", ".2f"),
    Column("vs transformers", "vs_transformers", ".2f"),
    Column("vs row loop", "vs_rows", ".1f"),
    Column("vs attention", "vs_attention", ".2f"),
    Column("max difference", "difference", ".1e"),
)
GRID = Grid(heads=((8, 8),), head_dims=(128,), keys=(8192, 65536), dtypes=("float32", "bfloat16"))
QUICK_GRID = Grid(heads=((2, 2),), head_dims=(32,), keys=(128, 256), dtypes=("float32", "bfloat16"))
#: Lengths at which our own causal attention is timed beside them.
CROSSOVER, QUICK_CROSSOVER = (128, 256, 512, 1024, 2048, 4096), (64, 128)
#: Sequences that decode at once: states of one fit the cache of a core, those of many do not.
BATCHES, QUICK_BATCHES = (1, 64), (1, 2)
LINE = ("method", "head_dim", "dtype", "threads")


@dataclass(frozen=True)
class Form:
    """A recurrence: its name, the function, its gates, and whether it follows the delta rule."""

    name: str
    call: Callable[..., Any]
    gates: tuple[str, ...]
    delta: bool = False

    def arguments(self, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
        """Arrays by name; keys have unit length, so that the delta rule is stable."""
        found = {name: gaussian(rng, shape, DTYPES[dtype]) for name in "qkv"}
        k = found["k"].astype(np.float32)
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        found["k"] = k.astype(DTYPES[dtype])
        if "head" in self.gates:
            found["g"] = np.broadcast_to(-0.1 * rng.random((shape[1], 1), np.float32), shape[:-1])
        if "row" in self.gates:
            found["g"] = -0.1 * rng.random(shape[:-1], np.float32)
        if "channel" in self.gates:
            found["g"] = -0.1 * rng.random(shape, np.float32)
        if self.delta:
            found["beta"] = rng.random(shape[:-1], np.float32)
        return found

    def flops(self, rows: int, dim: int) -> float:
        """Operations that are counted for `rows` rows of a head each."""
        states, chunk = (6 * dim * dim, 320 * dim) if self.delta else (4 * dim * dim, 128 * dim)
        return float(rows) * (states + chunk)


def _identity(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return linear.linear_attention(q, k, v, normalize=False, **options)


def _decayed(q: Any, k: Any, v: Any, g: Any, **options: Any) -> Any:
    return linear.lightning_attention(q, k, v, -g[0, :, 0], **options)


FORMS = (
    Form("linear_attention", _identity, ()),
    Form("lightning_attention", _decayed, ("head",)),
    Form("gated_linear_attention", lambda **x: linear.gated_linear_attention(**{"scale": 1.0, **x}), ("channel",)),
    Form("gated_delta_rule", lambda **x: linear.gated_delta_rule(**{"scale": 1.0, **x}), ("row",), True),
    Form(
        "kimi_delta_attention",
        lambda **x: linear.kimi_delta_attention(**{"scale": 1.0, "normalize_qk": False, **x}),
        ("channel",),
        True,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    add_grid(parser, GRID, heads=False)


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Prefill of the grid, decode steps, and the lengths from which each form is faster than attention."""
    grid = chosen_grid(args, GRID, QUICK_GRID)
    rows: list[Row] = []
    for (heads, _), dim, dtype, length in itertools.product(grid.heads, grid.head_dims, grid.dtypes, grid.keys):
        for form in FORMS:
            rows += _prefill(bench, form, heads, dim, length, dtype, length == min(grid.keys))
    heads, dim = grid.heads[0][0], grid.head_dims[0]
    for form, batch in itertools.product(FORMS, QUICK_BATCHES if bench.quick else BATCHES):
        rows += _step(bench, form, heads, dim, batch)
    crossover = [
        row
        for length in (QUICK_CROSSOVER if bench.quick else CROSSOVER)
        for row in _beside_attention(bench, heads, dim, length)
    ]
    rows += crossover
    for threads in bench.thread_counts:
        for form in FORMS:
            mine = [row for row in crossover if (row["form"], row["threads"]) == (form.name, threads)]
            faster = [row["keys"] for row in mine if row["vs_attention"] > 1]
            since = f"from {min(faster)} rows on" if faster else f"at no length up to {mine[-1]['keys']}"
            bench.notes.append(f"{form.name} is faster than longattn.attention {since}, {count(threads)}")
    prefill = [row for row in rows if row.get("gflop_s") and "vs_attention" not in row]
    return {"rows": rows, "slopes": slopes(prefill, LINE)}


def _prefill(bench: Bench, form: Form, heads: int, dim: int, length: int, dtype: str, recurrent: bool) -> list[Row]:
    bench.say(f"linear {form.name} {heads} x {dim}, length {length}, {dtype}")
    arguments = form.arguments(np.random.default_rng(0), (1, heads, length, dim), dtype)
    ours = f"longattn.linear.{form.name}"
    candidates = [Candidate(ours, lambda: form.call(**arguments)[0], peer=False)]
    if bench.peers:
        candidates += linear_peers.ways(arguments, form.delta, recurrent)
    rows: list[Row] = []
    for threads in bench.each_threads():
        before = bench.fma_gflop_s()
        outcomes = bench.interleave(candidates)
        peak = (before + bench.fma_gflop_s()) / 2
        case = {"threads": threads, "form": form.name, "query_heads": heads, "head_dim": dim}
        found = rows_of(outcomes, ours, {**case, "batch": 1, "keys": length, "dtype": dtype})
        for row in found:
            if row["ms"] is None:
                continue
            row["gflop_s"] = form.flops(heads * length, dim) / row["ms"] / 1e6
            row["of_fma"] = row["gflop_s"] / peak
            if not row["ours"]:
                difference = to_numpy(outcomes[row["method"]].result) - to_numpy(outcomes[ours].result)
                row["difference"] = float(np.abs(difference).max())
        for figure, peer in (
            ("vs_chunks", linear_peers.CHUNKS),
            ("vs_transformers", linear_peers.TRANSFORMERS),
            ("vs_rows", linear_peers.RECURRENT),
        ):
            if peer in outcomes and not outcomes[peer].failure:
                found[0][figure] = outcomes[peer].median_ms / found[0]["ms"]
        rows += found
    return rows


def _step(bench: Bench, form: Form, heads: int, dim: int, batch: int) -> list[Row]:
    bench.say(f"linear {form.name} {heads} x {dim}, step of {batch}")
    rng = np.random.default_rng(0)
    arguments = form.arguments(rng, (batch, heads, 1, dim), "float32")
    state = gaussian(rng, (batch, heads, dim, dim), np.float32)
    out = np.empty((batch, heads, 1, dim), np.float32)
    repeats = max(1, 64 // batch)
    ours = f"longattn.linear.{form.name}, step"

    def steps() -> None:
        for _ in range(repeats):
            form.call(**arguments, initial_state=state, out_state=state, out=out)

    rows: list[Row] = []
    for threads in bench.each_threads():
        outcomes = bench.interleave([Candidate(ours, steps, peer=False)])
        case = {"threads": threads, "form": form.name, "query_heads": heads, "head_dim": dim, "batch": batch}
        (row,) = rows_of(outcomes, ours, {**case, "keys": 1, "dtype": "float32"})
        for figure in ("ms", "ms_min", "ms_max"):
            row[figure] /= repeats
        row["gb_s"] = 2 * state.nbytes / row["ms"] / 1e6
        row["of_read"] = row["gb_s"] / bench.recent_read_gb_s()
        rows.append(row)
    return rows


def _beside_attention(bench: Bench, heads: int, dim: int, length: int) -> list[Row]:
    bench.say(f"linear beside attention {heads} x {dim}, length {length}")
    shape = (1, heads, length, dim)
    given = {form.name: form.arguments(np.random.default_rng(0), shape, "float32") for form in FORMS}
    q, k, v = (given[FORMS[0].name][name] for name in "qkv")
    candidates = [Candidate(ATTENTION, lambda: la.attention(q, k, v, causal=True), peer=False)]
    candidates += [Candidate(form.name, _bound(form, given[form.name]), peer=False) for form in FORMS]
    rows: list[Row] = []
    for threads in bench.each_threads():
        outcomes = bench.interleave(candidates)
        case = {"threads": threads, "query_heads": heads, "head_dim": dim, "batch": 1, "keys": length}
        for form in FORMS:
            own = {"form": form.name, "dtype": "float32", "method": f"longattn.linear.{form.name}", "ours": True}
            ratio = outcomes[ATTENTION].median_ms / outcomes[form.name].median_ms
            rows.append({**case, **own, **outcomes[form.name].columns(), "vs_attention": ratio})
    return rows


def _bound(form: Form, arguments: dict[str, Any]) -> Callable[[], Any]:
    return lambda: form.call(**arguments)


def panels(result: Result) -> list[Panel | Bars]:
    """Speed against attention over length, a panel per thread count."""
    rows = [row for row in result["rows"] if row.get("vs_attention")]
    return [
        Panel(
            f"speed against causal attention, {count(threads)}",
            "length",
            "times as fast",
            series([row for row in rows if row["threads"] == threads], "keys", "vs_attention", by="form"),
            limit=1,
        )
        for threads in sorted({row["threads"] for row in rows})
    ]


def _tables(found: Sequence[Result]) -> list[str]:
    rows = all_rows(found, "linear")
    grown = all_rows(found, "linear", "slopes")
    lines: list[str] = []
    for threads in values_of(rows, "threads"):
        mine = [row for row in rows if row["threads"] == threads]
        for part in (
            [row for row in mine if row.get("gflop_s")],
            [row for row in mine if row.get("gb_s")],
            [row for row in mine if row.get("vs_attention")],
        ):
            if part:
                lines += titled(threads, table(part, COLUMNS[1:]))
    slopes = [f"{row['of']}: {row['slope']:.2f}" for row in grown if row["method"].startswith("longattn")]
    return (
        [*lines, "", "Slopes of log time over log length:", "", *(f"- {line}" for line in slopes)] if slopes else lines
    )


def _targets() -> list[Target]:
    plain, delta = ("linear_attention", "lightning_attention"), ("gated_delta_rule", "kimi_delta_attention")
    found = []
    for text, figure, bound, forms, form in (
        ("the row loop in torch", "vs_rows", 30, None, ".1f"),
        ("the chunk loop in torch, decays of heads", "vs_chunks", 2.5, plain, ".1f"),
        ("the chunk loop in torch, delta rule", "vs_chunks", 5, delta, ".1f"),
        ("transformers' fallback", "vs_transformers", 8, delta, ".1f"),
        ("the multiply-add peak, decays of heads", "of_fma", 0.5, plain, ".0%"),
        ("the multiply-add peak, delta rule", "of_fma", 0.35, delta, ".0%"),
        ("the read bandwidth, decode steps", "of_read", 0.7, None, ".0%"),
    ):
        what = "share of" if form == ".0%" else "speed against"
        where = {"ours": (True,)} | ({"form": forms} if forms else {})
        found.append(
            Target(f"recurrences: {what} {text}", "linear", figure, bound, "longattn bench linear", where, form=form)
        )
    found.append(
        Target(
            "recurrences: time grows as length to the power",
            "linear",
            "slope",
            1.05,
            "longattn bench linear",
            {"method": tuple(f"longattn.linear.{form.name}" for form in FORMS)},
            table="slopes",
            at_most=True,
        )
    )
    return found


SECTIONS = (
    Section(
        "linear",
        "linear",
        "Linear attention and recurrences",
        "States `[D, D]` of 8 heads. `of FMA`: arithmetic as a share of the multiply-add peak, rows of a chunk of 64 "
        "with each other counted whatever the chunk. Decode steps: bytes of the state read and written per second, as "
        "a share of the read bandwidth. `vs attention`: speed against causal `longattn.attention` of the same shape.",
        _tables,
        whole("linear", panels),
    ),
)

TARGETS = tuple(_targets())
