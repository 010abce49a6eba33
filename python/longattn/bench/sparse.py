"""Attention over random blocks of keys and over windows: time against the share of the pairs that is computed.

`time / density` is the time over that of dense attention, divided by the density: 1 where time goes with density.
Masks are given, but for a row of dynamic blocks (`longattn.sparse.DynamicBlocks`), which are chosen in each call: its
time is that of choosing and attention, the time of choosing alone stands beside it, and `time / density` is without it.
With `--json` the rows of a density are written as soon as they are there, and the same command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn.bench import peers
from longattn.bench.arrays import DTYPES, gaussian
from longattn.bench.harness import Bench, Candidate, rows_of
from longattn.bench.kept import Kept
from longattn.bench.options import Grid, add_grid, chosen_grid
from longattn.bench.plots import Bars, Panel, Points
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, by_threads, grouped, whole
from longattn.bench.tables import Column, count
from longattn.bench.targets import Target
from longattn.sparse import DynamicBlocks

ROUTINE = "sparse"
SUMMARY = "attention over blocks of keys and windows: time against density, beside torch's flex and masked attention"
DENSE = "longattn.attention"
OURS = "longattn.block_sparse_attention"
WINDOW = "longattn.attention, window"
#: Blocks that are chosen in the call, of this size.
CHOSEN, CHOOSING, CHOSEN_BLOCK = "longattn.sparse_attention, dynamic blocks", "longattn.sparse.DynamicBlocks", 64
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("H", "query_heads"),
    Column("D", "head_dim"),
    Column("length", "keys"),
    Column("dtype", "dtype"),
    Column("mask", "mask"),
    Column("density", "density", ".1%"),
    Column("method", "method"),
    Column("ms", "ms", ".4g"),
    Column("min", "ms_min", ".4g"),
    Column("max", "ms_max", ".4g"),
    Column("calls", "calls"),
    Column("choosing ms", "selection_ms", ".4g"),
    Column("of dense", "of_dense", ".3f"),
    Column("time / density", "per_density", ".2f"),
    Column("× ours", "times_ours", ".2f"),
)
GRID = Grid(heads=((8, 8),), head_dims=(64, 128), keys=(16384, 65536), dtypes=("float32", "bfloat16"))
QUICK_GRID = Grid(heads=((2, 2),), head_dims=(64,), keys=(512,), dtypes=("float32", "bfloat16"))
DENSITIES, QUICK_DENSITIES = (0.02, 0.05, 0.1, 0.25, 0.5), (0.1, 0.5)
BLOCKS = (64, 128)
#: Peers take a mask of all pairs up to this length, and masks of at most this density. A mask of all pairs takes
#: gigabytes and as much time whatever its blocks are: that of one block size is measured.
MASKED, MASKED_BLOCK, PEER_DENSITY = 16384, 64, 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    add_grid(parser, GRID, heads=False)
    parser.add_argument(
        "--densities", type=_shares, metavar="X,X", help="of the masks (default 0.02,0.05,0.1,0.25,0.5)"
    )


def _shares(text: str) -> list[float]:
    """Argument type: `0.02,0.5`."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"expected shares above 0 and at most 1, comma-separated, got {text}")
    return values


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All shapes and masks that are not in the file yet; `slopes`, which are not of interest here, are empty."""
    grid = chosen_grid(args, GRID, QUICK_GRID)
    densities = args.densities or (QUICK_DENSITIES if bench.quick else DENSITIES)
    kept = Kept(bench, args, ROUTINE, ("quick",), _result)
    for (heads, _), dim, dtype, length in itertools.product(grid.heads, grid.head_dims, grid.dtypes, grid.keys):
        case = {"query_heads": heads, "head_dim": dim, "keys": length, "dtype": dtype}
        wanted = [
            (threads, density, make)
            for threads in bench.thread_counts
            for density in densities
            for make, method in ((_case, DENSE), (_chosen, CHOSEN))
            if not kept.has(**case, threads=threads, asked=density, method=method)
        ]
        if not wanted:
            continue
        rng = np.random.default_rng(0)
        arrays = [gaussian(rng, (1, heads, length, dim), DTYPES[dtype]) for _ in "qkv"]
        for threads, density, make in wanted:
            bench.say(f"sparse {heads} x {dim}, length {length}, {dtype}, density {density}")
            bench.use(threads)
            kept.keep(*make(bench, arrays, case | {"threads": threads, "asked": density}))
    return _result(kept.rows)


def _result(rows: Sequence[Row]) -> dict[str, Any]:
    return {"rows": list(rows), "slopes": []}


def random_mask(rng: np.random.Generator, heads: int, length: int, block: int, density: float) -> la.BlockMask:
    """As many random blocks of keys, one at least, for each block of queries."""
    blocks = -(-length // block)
    taken = max(1, round(density * blocks))
    order = np.argsort(rng.random((heads, blocks, blocks)), axis=-1) < taken
    return la.BlockMask.from_blocks(order, lengths=(length, length), block_q=block, block_k=block)


def _case(bench: Bench, arrays: list[NDArray[Any]], case: Row) -> list[Row]:
    """Rows of a density, dense attention's among them."""
    q, k, v = arrays
    length, density = case["keys"], case["asked"]
    candidates, masks = [Candidate(DENSE, lambda: la.attention(q, k, v), peer=False)], {}
    others: list[Candidate] = []
    for block in BLOCKS:
        mask = random_mask(np.random.default_rng(block), case["query_heads"], length, block, density)
        name = f"{OURS}, blocks of {block}"
        masks[name] = (f"blocks of {block}", mask.density())
        candidates.append(Candidate(name, _over(q, k, v, mask), peer=False))
        if bench.peers and density <= PEER_DENSITY:
            for peer in peers.sparse(q, k, v, mask, masked=length <= MASKED and block == MASKED_BLOCK):
                named = f"{peer.name}, blocks of {block}"
                masks[named] = masks[name]
                others.append(Candidate(named, peer.call))
    radius = round((length - np.sqrt(length**2 * (1 - density))) if density < 1 else length)
    seen = sum(min(i + radius, length - 1) - max(i - radius, 0) + 1 for i in range(length)) / length**2
    masks[WINDOW] = (f"window of {radius} to either side", seen)
    candidates.append(Candidate(WINDOW, _within(q, k, v, radius), peer=False))
    # Peers have their turns afterwards: what a mask of gigabytes leaves of caches and memory would be in our times.
    outcomes = bench.interleave(candidates) | (bench.interleave(others) if others else {})
    reference = outcomes[DENSE].median_ms
    rows = rows_of(outcomes, None, case)
    for row in rows:
        if row["method"] == DENSE:
            row |= {"mask": "none", "density": 1.0}
        else:
            row["mask"], row["density"] = masks[row["method"]]
        if row["ms"] is not None:
            row["of_dense"] = row["ms"] / reference
            row["per_density"] = row["of_dense"] / row["density"]
            ours = outcomes.get(f"{OURS}, {row['mask']}")
            row["times_ours"] = row["ms"] / ours.median_ms if ours else None
    return rows


def _chosen(bench: Bench, arrays: list[NDArray[Any]], case: Row) -> list[Row]:
    """The row of blocks that are chosen in the call, as many as the density asks for."""
    q, k, v = arrays
    blocks = -(-case["keys"] // CHOSEN_BLOCK)
    selector = DynamicBlocks(top_k=max(1, round(case["asked"] * blocks)), block=CHOSEN_BLOCK)
    outcomes = bench.interleave(
        [
            Candidate(DENSE, lambda: la.attention(q, k, v), peer=False),
            Candidate(CHOOSING, lambda: selector(q, k), peer=False),
            Candidate(CHOSEN, lambda: la.sparse_attention(q, k, v, selector), peer=False),
        ]
    )
    (row,) = rows_of({CHOSEN: outcomes[CHOSEN]}, None, case)
    row |= {"mask": f"dynamic blocks of {CHOSEN_BLOCK}", "density": selector(q, k).density()}
    if row["ms"] is not None:
        row["selection_ms"], dense = outcomes[CHOOSING].median_ms, outcomes[DENSE].median_ms
        row["of_dense"] = row["ms"] / dense
        row["per_density"] = max(row["ms"] - row["selection_ms"], 0.0) / dense / row["density"]
    return [row]


def _over(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: la.BlockMask) -> Any:
    return lambda: la.block_sparse_attention(q, k, v, mask)


def _within(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], radius: int) -> Any:
    return lambda: la.attention(q, k, v, window=(radius, radius))


def panels(result: Result) -> list[Panel | Bars]:
    """Time over dense time against density, a panel for each head_dim, dtype, length and thread count."""
    rows = [row for row in result["rows"] if row["ms"] is not None and row["method"] != DENSE]
    drawn: list[Panel | Bars] = []
    for (dim, dtype, keys, threads), mine in grouped(rows, "head_dim", "dtype", "keys", "threads").items():
        lines: dict[str, Points] = {}
        for row in mine:
            lines.setdefault(row["method"].removeprefix("longattn."), []).append((row["density"], row["of_dense"]))
        title = f"D {dim}, {dtype}, {keys} keys, {count(threads)}"
        drawn.append(Panel(title, "density", "time / dense time", {name: sorted(line) for name, line in lines.items()}))
    return drawn


def _tables(found: Sequence[Result]) -> list[str]:
    return by_threads([row for row in all_rows(found, "sparse") if row["method"] != DENSE], COLUMNS[2:])


SECTIONS = (
    Section(
        "sparse",
        "sparse",
        "Attention over blocks of keys and windows",
        "8 heads, not causal, random blocks. `of dense`: time over that of dense attention; `time / density`: this "
        "over the share of the pairs that is computed. `× ours`: time over ours with the same mask. Masks are given; "
        "dynamic blocks are chosen in the call, and `time / density` is without the time of choosing.",
        _tables,
        whole("sparse", panels),
    ),
)

TARGETS = (
    Target(
        "blocks and windows: time over dense attention's, over the density",
        "sparse",
        "per_density",
        1.2,
        "longattn bench sparse",
        {"ours": (True,)},
        {"density": (0, 0.99)},
        at_most=True,
    ),
    *(
        Target(
            f"blocks and windows: time of {peer} over ours, density ≤ 10 %",
            "sparse",
            "times_ours",
            bound,
            "longattn bench sparse",
            {"method": tuple(f"{peer}, blocks of {block}" for block in blocks)},
            {"density": (0, 0.1)},
        )
        for peer, blocks, bound in (
            ("torch flex_attention", BLOCKS, 3.0),
            ("torch SDPA, masked", (MASKED_BLOCK,), 5.0),
        )
    ),
)
