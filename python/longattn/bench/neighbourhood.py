"""Attention over windows of a grid: images and videos.

GFLOP/s counts the pairs of queries and keys inside windows, 4 H D times tokens times keys of a window; what a kernel
computes beyond them is its own affair.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn.bench import peers
from longattn.bench.arrays import DTYPES, gaussian
from longattn.bench.harness import Bench, Candidate, reason, rows_of, slopes
from longattn.bench.options import names
from longattn.bench.plots import Bars, Panel
from longattn.bench.results import Result, Row
from longattn.bench.sections import Figures, Section, all_rows, grouped, number, slope_of
from longattn.bench.tables import Column, count, grid
from longattn.bench.targets import Target
from longattn.sparse._grid import window_axis

SUMMARY = (
    "attention over windows of images and videos, against torch's gathered and unfolded windows and flex_attention"
)
OURS = "longattn neighbourhood"
GATHER = "torch gather"
UNFOLD = "torch unfold"
FLEX = "torch flex_attention, compiled"
PEERS = (GATHER, UNFOLD, FLEX)
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("H", "query_heads"),
    Column("D", "head_dim"),
    Column("grid", "grid"),
    Column("window", "window"),
    Column("dtype", "dtype"),
    Column("method", "method"),
    Column("ms", "ms", ".4g"),
    Column("min", "ms_min", ".4g"),
    Column("max", "ms_max", ".4g"),
    Column("calls", "calls"),
    Column("GFLOP/s", "gflop_s", ".3g"),
    Column("of FMA", "of_fma", ".0%"),
    Column("× ours", "times_ours", ".2f"),
    Column("error", "error", ".1e"),
)
#: Grids and windows; those of one window are of several sizes, for the growth of time.
CASES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((28, 28), (7, 7)),
    ((56, 56), (7, 7)),
    ((112, 112), (7, 7)),
    ((56, 56), (13, 13)),
    ((16, 28, 28), (3, 7, 7)),
)
QUICK_CASES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (((8, 8), (3, 3)), ((12, 12), (3, 3)))
HEADS, DIM = 12, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument(
        "--dtypes", type=names(tuple(DTYPES)), default=None, metavar="A,B", help="storage (default float32)"
    )


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All grids; rows, and growth exponents of time over tokens."""
    rows: list[Row] = []
    cases = QUICK_CASES if bench.quick else CASES
    for (shape, window), dtype in itertools.product(cases, args.dtypes or ("float32",)):
        rows += _case(bench, shape, window, dtype)
    return {"rows": rows, "slopes": slopes(rows, ("method", "window", "dtype", "threads"))}


def _case(bench: Bench, shape: tuple[int, ...], window: tuple[int, ...], dtype: str) -> list[Row]:
    rng = np.random.default_rng(0)
    q, k, v = (gaussian(rng, (1, HEADS, *shape, DIM), DTYPES[dtype]) for _ in "qkv")
    grid, sizes = "x".join(map(str, shape)), "x".join(map(str, window))
    bench.say(f"neighbourhood {grid}, window {sizes}, {dtype}")

    def ours() -> Any:
        return la.sparse.generalized_neighborhood_attention(q, k, v, window=window)

    rows: list[Row] = []
    for threads in bench.each_threads():
        candidates = [Candidate(OURS, ours, peer=False)]
        if bench.peers:
            candidates += _peers(q, k, v, window)
        before = bench.fma_gflop_s()
        outcomes = bench.interleave(candidates)
        peak = (before + bench.fma_gflop_s()) / 2
        case = {
            "threads": threads,
            "query_heads": HEADS,
            "head_dim": DIM,
            "keys": math.prod(shape),
            "grid": grid,
            "window": sizes,
            "dtype": dtype,
        }
        found = rows_of(outcomes, OURS, case)
        exact = peers.to_numpy(outcomes[OURS].result).reshape(HEADS, -1, DIM)
        for row in found:
            if row["ms"] is None:
                continue
            row["gflop_s"] = 4 * HEADS * DIM * math.prod(shape) * math.prod(window) / row["ms"] / 1e6
            row["of_fma"] = row["gflop_s"] / peak
            other = peers.to_numpy(outcomes[row["method"]].result).reshape(HEADS, -1, DIM)
            row["error"] = float(np.abs(other - exact).max())
        rows += found
    return rows


def _peers(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], window: tuple[int, ...]) -> list[Candidate]:
    """Ways to the same result with torch; what depends on the grid alone is made beforehand."""
    import torch

    shape, dim = q.shape[2:-1], q.shape[-1]
    starts = [window_axis(n, w).intervals[:, 1].astype(np.int64) for n, w in zip(shape, window, strict=True)]
    per_axis = [start[:, None] + np.arange(w) for start, w in zip(starts, window, strict=True)]
    # The tokens of each token's window, [L, keys].
    index = np.zeros((1, 1), np.int64)
    for n, tokens in zip(shape, per_axis, strict=True):
        index = (index[:, None, :, None] * n + tokens[None, :, None, :]).reshape(len(index) * n, -1)
    chosen = torch.from_numpy(index)
    tq, tk, tv = (peers.tensor(x.reshape(1, HEADS, -1, dim)) for x in (q, k, v))
    gk, gv = (peers.tensor(x) for x in (k, v))
    placed = [torch.from_numpy(start) for start in starts]

    def attend(keys: Any, values: Any) -> Any:
        # One query against its own keys and values, [.., L, keys, D].
        weights = torch.softmax(torch.matmul(keys, tq[..., None])[..., 0].float() * dim**-0.5, -1)
        return torch.matmul(weights[..., None, :].to(values.dtype), values)[..., 0, :]

    def gather() -> Any:
        return attend(tk[:, :, chosen], tv[:, :, chosen])

    def unfolded(x: Any) -> Any:
        for axis, (start, size) in enumerate(zip(placed, window, strict=True)):
            x = x.unfold(2 + axis, size, 1).index_select(2 + axis, start)
        # [1, H, X1.., D, w1..] -> [1, H, L, keys, D]
        return x.reshape(1, HEADS, len(index), dim, -1).mT

    def unfold() -> Any:
        return attend(unfolded(gk), unfolded(gv))

    found = [Candidate(GATHER, gather), Candidate(UNFOLD, unfold)]
    return [*found, _flex(tq, tk, tv, shape, window, placed)]


def _flex(tq: Any, tk: Any, tv: Any, shape: tuple[int, ...], window: tuple[int, ...], starts: list[Any]) -> Candidate:
    """flex_attention with a block mask, compiled and called once."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
        visible = query >= 0
        for n, size, start in zip(reversed(shape), reversed(window), reversed(starts), strict=True):
            own, other = start[query % n], key % n
            visible = visible & (other >= own) & (other < own + size)
            query, key = query // n, key // n
        return visible

    call: Callable[[], Any]
    try:
        with torch.no_grad():
            length = tq.shape[2]
            blocks = create_block_mask(sees, None, None, length, length, device="cpu", BLOCK_SIZE=128)
            torch._dynamo.reset()
            compiled = torch.compile(flex_attention, dynamic=False)
            compiled(tq, tk, tv, block_mask=blocks)
    except Exception as error:  # no compiler, or shapes that its templates refuse
        failed = reason(error)

        def call() -> Any:
            raise RuntimeError(failed)
    else:

        def call() -> Any:
            with torch.no_grad():
                return compiled(tq, tk, tv, block_mask=blocks)

    return Candidate(FLEX, call)


def panels(result: Result) -> list[Panel | Bars]:
    """Time as a multiple of ours, by grid and window, a panel per dtype and thread count."""
    rows = [row for row in result["rows"] if row["times_ours"] and not row["ours"]]
    drawn: list[Panel | Bars] = []
    for (dtype, threads), mine in grouped(rows, "dtype", "threads").items():
        kinds = list(dict.fromkeys((row["grid"], row["window"]) for row in mine))
        times = {(row["method"], row["grid"], row["window"]): row["times_ours"] for row in mine}
        bars = {
            method: tuple(times.get((method, *kind)) for kind in kinds)
            for method in dict.fromkeys(row["method"] for row in mine)
        }
        labels = tuple(f"{grid}, {window}" for grid, window in kinds)
        title = f"windows of a grid, {dtype}, {count(threads)}: time as a multiple of ours"
        drawn.append(Bars(title, "ratio", labels, bars, limit=1))
    return drawn


def _tables(found: Sequence[Result]) -> list[str]:
    rows, grown = all_rows(found, "neighbourhood"), all_rows(found, "neighbourhood", "slopes")
    lines = [row for row in rows if row["ours"]]
    if not lines:
        return []
    cells = []
    for row in lines:
        case = ("threads", "grid", "window", "dtype")
        times = {other["method"]: other["times_ours"] for other in rows if all(other[key] == row[key] for key in case)}
        cells.append(
            [row["grid"], row["window"], row["dtype"], str(row["threads"]), f"{row['ms']:.3g}", f"{row['of_fma']:.0%}"]
            + [number(times.get(peer), ".1f") for peer in PEERS]
            + [slope_of(grown, ("method", "window", "dtype", "threads"), row)]
        )
    heads = [
        "grid",
        "window",
        "dtype",
        "threads",
        "ms",
        "of FMA",
        *(f"× {peer}" for peer in PEERS),
        "slope",
    ]
    return ["", *grid(heads, cells)]


def _figures(found: Sequence[Result]) -> Figures:
    rows = all_rows(found, "neighbourhood")
    measured = any(not row["ours"] and row["times_ours"] for row in rows)
    return {"neighbourhood": panels({"rows": rows})} if measured else {}


SECTIONS = (
    Section(
        "sparse",
        "neighbourhood",
        "Neighbourhoods: windows of images and videos",
        f"{HEADS} heads, D {DIM}. `of FMA`: arithmetic inside the windows as a share of "
        "the multiply-add peak. `×`: the peer's time over ours; its block mask and compilation are not in it. `slope`: "
        "of log time over log tokens, at one window.",
        _tables,
        _figures,
    ),
)

TARGETS = tuple(
    Target(
        f"neighbourhoods: time of {peer} over ours",
        "neighbourhood",
        "times_ours",
        5.0,
        "longattn bench neighbourhood",
        {"method": (peer,), "grid": ("56x56", "16x28x28")},
    )
    for peer in PEERS
)
