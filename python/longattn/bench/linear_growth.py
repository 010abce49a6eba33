"""How time and memory of recurrences grow with the length: time linearly, memory beside inputs and outputs not at all.

Lengths take turns: each call of the longest stands beside as many rows in shorter calls, so that a machine that slows
down slows all of them. The exponent is the median over the turns. Results go into arrays that are there already, as
new ones would cost pages where they are long and none where they are short.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longattn.bench import memory
from longattn.bench.arrays import DTYPES
from longattn.bench.harness import Bench, Candidate
from longattn.bench.linear_forms import FORMS, Form
from longattn.bench.options import Grid
from longattn.bench.results import Row
from longattn.bench.sections import short
from longattn.bench.tables import count, grid

#: Rows of the call that is made before memory is looked at.
FEW = 128


def measure(bench: Bench, shapes: Grid, with_memory: bool) -> dict[str, list[Row]]:
    """Rows per form, shape, dtype and thread count: exponents of time (`slopes`), and `memory` by length."""
    if len(shapes.keys) < 2:
        return {"slopes": [], "memory": []}
    if with_memory and not memory.supported():
        with_memory = False
        bench.notes.append("memory not measured: it needs Linux's /proc/self/clear_refs")
    slopes: list[Row] = []
    taken: list[Row] = []
    for (heads, _), dim, dtype, form in itertools.product(shapes.heads, shapes.head_dims, shapes.dtypes, FORMS):
        bench.say(
            f"linear {form.name} {heads} x {dim}, {dtype}: growth over {', '.join(map(str, sorted(shapes.keys)))}"
        )
        for threads in bench.each_threads():
            case = {"threads": threads, "form": form.name, "query_heads": heads, "head_dim": dim, "dtype": dtype}
            case["method"] = f"longattn.linear.{form.name}"
            row = {**case, "keys": max(shapes.keys), **_exponent(bench, form, heads, dim, dtype, shapes.keys)}
            row["of"] = f"{case['method']}, D {dim}, {dtype}, {count(threads)}"
            if with_memory:
                mine: list[Row] = [
                    {**case, "keys": n, **_memory(form, heads, dim, n, dtype, threads)} for n in sorted(shapes.keys)
                ]
                more = {name: mine[-1][name] - mine[0][name] for name in ("extra_mb", "arrays_mb")}
                row["memory_share"] = more["extra_mb"] / more["arrays_mb"]
                taken += mine
            slopes.append(row)
    return {"slopes": slopes, "memory": taken}


def _exponent(bench: Bench, form: Form, heads: int, dim: int, dtype: str, lengths: Sequence[int]) -> dict[str, float]:
    """The median exponent of the turns, its least and greatest, and how far from 1 it is."""
    longest = max(lengths)
    repeats = {n: max(1, longest // n) for n in sorted(lengths)}
    candidates = [
        Candidate(str(n), _repeated(_call(form, heads, dim, n, dtype), times), peer=False)
        for n, times in repeats.items()
    ]
    outcomes = bench.interleave(candidates)
    seconds = np.array([np.array(outcomes[str(n)].seconds) / times for n, times in repeats.items()])
    exponents = np.polyfit(np.log(list(repeats)), np.log(seconds), 1)[0].tolist()
    slope = statistics.median(exponents)
    return {
        "slope": slope,
        "slope_min": min(exponents),
        "slope_max": max(exponents),
        "from_linear": abs(slope - 1),
    }


def _memory(form: Form, heads: int, dim: int, length: int, dtype: str, threads: int) -> dict[str, float]:
    """Megabytes beside inputs and outputs, exact to about one, and of these."""
    extra = memory.extra_bytes(f"{__name__}:calls_for_memory", (form.name, heads, dim, length, dtype), threads)
    gates = {"row": 1, "channel": dim}.get("".join(form.gates), 0) + form.delta
    given = heads * length * (4 * dim * np.dtype(DTYPES[dtype]).itemsize + 4 * gates)
    return {"extra_mb": extra / 1e6, "arrays_mb": given / 1e6}


def calls_for_memory(
    name: str, heads: int, dim: int, length: int, dtype: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A call over a few rows and the one whose memory is measured, for `memory.of_call`."""
    form = next(form for form in FORMS if form.name == name)
    return _call(form, heads, dim, FEW, dtype), _call(form, heads, dim, length, dtype)


def _call(form: Form, heads: int, dim: int, length: int, dtype: str) -> Callable[[], Any]:
    """A call into arrays that are there already."""
    arguments = form.arguments(np.random.default_rng(0), (1, heads, length, dim), dtype)
    out, state = np.ones((1, heads, length, dim), DTYPES[dtype]), np.ones((1, heads, dim, dim), np.float32)
    return lambda: form.call(**arguments, out=out, out_state=state)


def _repeated(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def lines(slopes: Sequence[Row], taken: Sequence[Row]) -> list[str]:
    """A table: per form, dtype and thread count the exponent with its spread, and memory by length."""
    lengths = sorted({row["keys"] for row in taken})
    cells = []
    for row in slopes:
        same = ("form", "head_dim", "dtype", "threads")
        mine = {x["keys"]: x["extra_mb"] for x in taken if all(x[key] == row[key] for key in same)}
        spread = f"{row['slope']:.2f} [{row['slope_min']:.2f}-{row['slope_max']:.2f}]"
        cells.append([*(str(row[key]) for key in same), spread, *(f"{mine[n]:.2f}" for n in lengths)])
    heads = ["form", "D", "dtype", "threads", "exponent of time", *(f"MB beside arrays, {short(n)}" for n in lengths)]
    return ["", *grid(heads, cells)] if cells else []
