"""From which length on linear forms are faster than our own causal attention of the same heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import longattn as la
from longattn import linear
from longattn.bench.harness import Bench, Candidate
from longattn.bench.linear_cases import CASES, Inputs
from longattn.bench.plots import Bars, Panel, series
from longattn.bench.results import Row
from longattn.bench.sections import short
from longattn.bench.tables import count, grid

ATTENTION = "longattn.attention"
LENGTHS, QUICK_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192), (64, 128)
#: Causal methods over queries, keys and values.
METHODS = (
    "linear_attention",
    "lightning_attention",
    "retention",
    "gated_linear_attention",
    "hgrn2",
    "rwkv6",
    "regla",
    "gated_slot_attention",
    "causal_performer_attention",
    "state_space_duality",
    "delta_rule_attention",
    "gated_delta_rule",
    "kimi_delta_attention",
    "rwkv7",
)


def measure(bench: Bench, heads: int, dim: int) -> list[Row]:
    """A row per method, length and thread count, float32: its time, and how many times as long attention takes."""
    rows: list[Row] = []
    for length in QUICK_LENGTHS if bench.quick else LENGTHS:
        bench.say(f"linear beside attention {heads} x {dim}, length {length}")
        q, k, v = (np.ascontiguousarray(x) for x in Inputs(places=length, heads=heads, dim=dim).qkv())
        candidates = [Candidate(ATTENTION, partial(la.attention, q, k, v, causal=True), peer=False)]
        candidates += [Candidate(name, _call(name, length, heads, dim), peer=False) for name in METHODS]
        for threads in bench.each_threads():
            outcomes = bench.interleave(candidates)
            case = {"threads": threads, "query_heads": heads, "head_dim": dim, "keys": length, "dtype": "float32"}
            for name in METHODS:
                ratio = outcomes[ATTENTION].median_ms / outcomes[name].median_ms
                rows.append({**case, "form": name, **outcomes[name].columns(), "vs_attention": ratio})
    return rows


def _call(name: str, length: int, heads: int, dim: int) -> Callable[[], Any]:
    arguments, options = CASES[name](Inputs(places=length, heads=heads, dim=dim))
    function = getattr(linear, name)
    return lambda: function(*arguments, **options)


def faster_from(ratios: dict[int, float]) -> float | None:
    """The length from which on a form stays faster, between two that were measured where it lies there.

    Args:
        ratios: times of attention over times of the form, by length.

    Returns:
        The length; the least one where all ratios are above 1, `None` where the last is not.
    """
    lengths = sorted(ratios)
    slower = [n for n in lengths if ratios[n] <= 1]
    if not slower:
        return float(lengths[0])
    below = slower[-1]
    if below == lengths[-1]:
        return None
    above = lengths[lengths.index(below) + 1]
    # Ratios are close to straight lines where both axes are logarithmic.
    share = -math.log(ratios[below]) / math.log(ratios[above] / ratios[below])
    return float(below * (above / below) ** share)


def lines(rows: Sequence[Row]) -> list[str]:
    """A table per thread count: speed against attention by length, and the length from which on a form is faster."""
    made: list[str] = []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        mine = [row for row in rows if row["threads"] == threads]
        lengths = sorted({row["keys"] for row in mine})
        cells = []
        for form in dict.fromkeys(row["form"] for row in mine):
            ratios = {row["keys"]: row["vs_attention"] for row in mine if row["form"] == form}
            start = faster_from(ratios)
            said = f"more than {short(lengths[-1])}" if start is None else f"{start:.0f}"
            said = f"at most {said}" if start == lengths[0] else said
            cells.append([form, *(f"{ratios[n]:.2f}" for n in lengths), said])
        heads = [f"speed against {ATTENTION}, {count(threads)}", *map(short, lengths), "faster from"]
        made += ["", *grid(heads, cells)]
    return made


def panels(rows: Sequence[Row]) -> list[Panel | Bars]:
    """Speed against attention over length, a panel per thread count."""
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
