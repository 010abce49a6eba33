"""Linear attention over all keys at once, beside the same formulas as torch's matrix products."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import longattn.linear as ours
from longattn.bench import peers
from longattn.bench.arrays import DTYPES, gaussian
from longattn.bench.harness import Bench, Candidate, rows_of, slopes
from longattn.bench.options import Grid, add_grid, chosen_grid
from longattn.bench.plots import Bars, Panel, series
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, by_threads, grouped
from longattn.bench.tables import Column, count

SUMMARY = "linear attention over all keys at once, beside the same formula as torch's matrix products"
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("formula", "formula"),
    Column("H", "query_heads"),
    Column("D", "head_dim"),
    Column("length", "keys"),
    Column("dtype", "dtype"),
    Column("method", "method"),
    Column("ms", "ms", ".4g"),
    Column("min", "ms_min", ".4g"),
    Column("max", "ms_max", ".4g"),
    Column("calls", "calls"),
    Column("GFLOP/s", "gflop_s", ".3g"),
    Column("of FMA", "of_fma", ".0%"),
    Column("× torch", "vs_torch", ".2f"),
    Column("difference", "difference", ".1e"),
)
GRID = Grid(heads=((8, 8),), head_dims=(32, 64, 128), keys=(1024, 8192, 65536), dtypes=("float32",))
QUICK_GRID = Grid(heads=((2, 2),), head_dims=(32,), keys=(128, 256), dtypes=("float32",))
LINE = ("method", "head_dim", "dtype", "threads")
AGENTS, FEATURES, LONGEST_FASTMAX = 49, 64, 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    add_grid(parser, GRID, heads=True)
    parser.add_argument("--batch", type=int, default=1, help="sequences (default %(default)s)")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All formulas in all shapes, and growth exponents of time."""
    grid = chosen_grid(args, GRID, QUICK_GRID)
    rows: list[Row] = []
    for (heads, kv_heads), dim, dtype, length in itertools.product(grid.heads, grid.head_dims, grid.dtypes, grid.keys):
        if heads != kv_heads:
            raise ValueError(f"--heads: got {heads}/{kv_heads}, expected as many KV heads as query heads")
        rows += _case(bench, args.batch, heads, dim, length, dtype)
    return {"rows": rows, "slopes": slopes(rows, LINE)}


Call = Callable[[], Any]


def formulas(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> dict[str, tuple[int, Call]]:
    """Our calls by name, each with the number of features it has."""
    dim = q.shape[-1]
    directions = ours.random_directions(FEATURES, dim, seed=0)
    agents = np.ascontiguousarray(q[:, :, :: max(1, q.shape[2] // AGENTS)][:, :, :AGENTS])
    calls: dict[str, tuple[int, Call]] = {
        "efficient": (dim, lambda: ours.efficient_attention(q, k, v)),
        "focused": (dim, lambda: ours.focused_linear_attention(q, k, v)),
        "simplified": (dim, lambda: ours.simplified_linear_attention(q, k, v)),
        "magnitude-aware": (dim, lambda: ours.magnitude_aware_linear_attention(q, k, v)),
        "inline": (dim, lambda: ours.inline_attention(q, k, v)),
        "l2vit": (dim, lambda: ours.l2vit_linear_attention(q, k, v)),
        "linear match": (dim, lambda: ours.linear_match_attention(q, k, v)),
        "performer": (FEATURES, lambda: ours.performer_attention(q, k, v, directions)),
        "agent": (2 * agents.shape[2], lambda: ours.agent_attention(q, k, v, agents=agents)),
    }
    if q.shape[2] <= LONGEST_FASTMAX and dim <= 64:
        calls["fastmax"] = (1 + dim + dim * (dim + 1) // 2, lambda: ours.fastmax_attention(q, k, v))
    return calls


def torch_formulas(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> dict[str, Call]:
    """The same as matrix products and elementwise functions of torch."""
    import torch
    from torch.nn import functional

    tq, tk, tv = peers.tensor(q), peers.tensor(k), peers.tensor(v)
    dim, keys = q.shape[-1], k.shape[-2]
    scale = dim**-0.5
    directions = torch.from_numpy(ours.random_directions(FEATURES, dim, seed=0)).to(tq.dtype)
    agents = tq[:, :, :: max(1, q.shape[2] // AGENTS)][:, :, :AGENTS].contiguous()

    def divided(phi_q: Any, phi_k: Any, eps: float) -> Any:
        return (phi_q @ (phi_k.mT @ tv)) / (phi_q @ phi_k.sum(2)[..., None] + eps)

    def focused() -> Any:
        mapped: list[Any] = []
        for x in (tq, tk):
            y = (torch.relu(x) + 1e-6) / np.log(2)
            z = y**3
            ratio = y.norm(dim=(1, 3), keepdim=True) / z.norm(dim=(1, 3), keepdim=True)
            mapped.append(z * ratio)
        return divided(mapped[0], mapped[1], keys * 1e-6)  # of means over the keys

    def magnitude_aware() -> Any:
        phi_q, phi_k = functional.elu(tq) + 1, functional.elu(tk) + 1
        mean = scale * (phi_q @ phi_k.mean(2)[..., None])
        return (1 + 1 / (mean + 1e-6)) * (phi_q @ (phi_k.mT @ tv) * (scale / keys)) - mean * tv.mean(2, keepdim=True)

    def inline() -> Any:
        share = 1 - scale * (tq @ tk.mean(2)[..., None])
        return tq @ (tk.mT @ tv) * (scale / keys) + share * tv.mean(2, keepdim=True)

    def l2vit() -> Any:
        phi_q, phi_k = torch.relu(tq), torch.relu(tk)
        return scale * (phi_q @ (phi_k.mT @ tv)) / (phi_q @ phi_k.sum(2)[..., None]).clamp(min=100)

    def performer() -> Any:
        mapped: list[Any] = []
        for x, axes in ((tq, (3,)), (tk, (2, 3))):
            y = scale**0.5 * x
            exponents = y @ directions.mT - (y * y).sum(-1, keepdim=True) / 2
            mapped.append(torch.exp(exponents - exponents.amax(axes, keepdim=True)))
        return divided(mapped[0], mapped[1], 0.0)

    def fastmax() -> Any:
        mapped: list[Any] = []
        for x in (tq, tk):
            y = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)
            squares = (y[..., :, None] * y[..., None, :]).flatten(-2) / 2**0.5
            mapped.append(torch.cat([torch.ones_like(y[..., :1]), y, squares], -1))
        return divided(mapped[0], mapped[1], 0.0)

    def agent() -> Any:
        gathered = torch.softmax(scale * (agents @ tk.mT), -1) @ tv
        return torch.softmax(scale * (tq @ agents.mT), -1) @ gathered

    return {
        "efficient": lambda: torch.softmax(tq, -1) @ (torch.softmax(tk, 2).mT @ tv),
        "focused": focused,
        "simplified": lambda: divided(torch.relu(tq), torch.relu(tk), 1e-6),
        "magnitude-aware": magnitude_aware,
        "inline": inline,
        "l2vit": l2vit,
        "linear match": lambda: divided(functional.elu(tq) + 1, functional.elu(tk) + 1, 1e-6),
        "performer": performer,
        "agent": agent,
        "fastmax": fastmax,
    }


def _case(bench: Bench, batch: int, heads: int, dim: int, length: int, dtype: str) -> list[Row]:
    rng = np.random.default_rng(0)
    q, k, v = (gaussian(rng, (batch, heads, length, dim), DTYPES[dtype]) for _ in "qkv")
    bench.say(f"linear attention {batch} x {heads} x {dim}, length {length}, {dtype}")
    theirs = torch_formulas(q, k, v) if bench.peers else {}
    rows: list[Row] = []
    for threads in bench.each_threads():
        for formula, (features, call) in formulas(q, k, v).items():
            mine, other = f"longattn, {formula}", f"torch, {formula}"
            candidates = [Candidate(mine, call, peer=False)]
            if formula in theirs:
                candidates.append(Candidate(other, theirs[formula]))
            before = bench.fma_gflop_s()
            outcomes = bench.interleave(candidates)
            peak = (before + bench.fma_gflop_s()) / 2
            case = {"threads": threads, "query_heads": heads, "head_dim": dim, "keys": length, "dtype": dtype}
            found = rows_of(outcomes, mine, case | {"formula": formula})
            for row in found:
                if row["ms"] is None:
                    continue
                row["gflop_s"] = 4 * batch * heads * length * features * dim / row["ms"] / 1e6
                row["of_fma"] = row["gflop_s"] / peak
                if row["ours"] and other in outcomes and not outcomes[other].failure:
                    row["vs_torch"] = outcomes[other].median_ms / row["ms"]
                    found_ours, found_torch = (peers.to_numpy(outcomes[name].result) for name in (mine, other))
                    row["difference"] = float(np.abs(found_ours - found_torch).max() / np.abs(found_torch).max())
            rows += found
    return rows


def panels(result: Result) -> list[Panel | Bars]:
    """Time over length, a panel per formula, head_dim and thread count."""
    groups = grouped(result["rows"], "formula", "head_dim", "threads")
    return [
        Panel(f"{formula}, D {dim}, {count(threads)}", "length", "ms", series(mine, "keys", "ms"), log_y=True)
        for (formula, dim, threads), mine in groups.items()
    ]


def _tables(found: Sequence[Result]) -> list[str]:
    return by_threads([row for row in all_rows(found, "global-linear") if row["ours"]], COLUMNS[1:])


SECTIONS = (
    Section(
        "linear",
        "global-linear",
        "Linear attention over all keys at once",
        "`of FMA`: two products per feature and value channel as a share of the multiply-add peak; making features is "
        "on top. `× torch`: speed against the same formula as torch's matrix products and elementwise functions; "
        "`difference`: the largest difference of the two results, of the largest number.",
        _tables,
    ),
)
