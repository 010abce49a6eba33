"""How much of the softmax mass the selectors for prompts keep at which density, on the demo model's own vectors.

The demo's small model reads a text; queries and keys of its full layers are kept. Every selector is run with a row of
values of the parameter that trades density for mass. `mass` is the mean over queries and heads of the share of the
softmax that lies inside the mask: `e^(lse inside - lse of all)`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn.bench.harness import Bench
from longattn.bench.plots import Bars, Panel
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, whole
from longattn.bench.tables import Column, table
from longattn.demo import runner, text
from longattn.sparse import (
    Anchor,
    Antidiagonal,
    Dhsa,
    DynamicBlocks,
    FlexPrefill,
    Sale,
    Selector,
    Sparge,
    VerticalSlash,
)

SUMMARY = "softmax mass that selectors for prompts keep, against density, on a small model's own queries and keys"
COLUMNS: tuple[Column, ...] = (
    Column("keys", "keys"),
    Column("layers", "layers"),
    Column("selector", "method"),
    Column("parameter", "parameter"),
    Column("density", "density", ".2%"),
    Column("mass", "mass", ".2%"),
    Column("5 % of queries below", "mass_low", ".2%"),
    Column("selection ms", "ms", ".4g"),
    Column("dense ms", "dense_ms", ".4g"),
)
LENGTH, QUICK_LENGTH = 16384, 2048
#: Name, parameter, its values, and what makes the selector.
SWEEPS: Mapping[str, tuple[str, Sequence[float], Callable[[Any], Selector]]] = {
    # Rows of this model's blocks are hardly alike: above 0.05 `theta` would take nearly every block.
    "sparge": ("cdf", (0.3, 0.5, 0.7, 0.9, 0.95, 0.99), lambda x: Sparge(cdf=x, theta=0.0, sink=True)),
    # Its sinks and near keys weigh little: weights that are small beside theirs are those of most blocks.
    "sale": ("tau", (1e4, 300.0, 30.0, 10.0, 3.0, 1.0, 0.1), lambda x: Sale(tau=x)),
    "anchor": ("theta", (0.0, 2.0, 4.0, 6.0, 9.0, 12.0), lambda x: Anchor(theta=x, step=4)),
    "dhsa": (
        "budget",
        (256, 512, 1024, 2048, 4096),
        lambda x: Dhsa(budget=int(x), instruction_tokens=0, per_head=True),
    ),
    "vertical and slash": (
        "lines of either kind",
        (64, 128, 256, 512, 1024, 2048),
        lambda x: VerticalSlash(vertical=int(x), slash=int(x)),
    ),
    "xattention": ("threshold", (0.3, 0.5, 0.7, 0.8, 0.9, 0.95), lambda x: Antidiagonal(threshold=x, stride=8)),
    "flexprefill": ("gamma", (0.3, 0.5, 0.7, 0.9, 0.95, 0.99), lambda x: FlexPrefill(gamma=x, min_budget=256)),
    "dynamic blocks": ("top_k", (4, 8, 16, 32, 64, 128), lambda x: DynamicBlocks(top_k=int(x))),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument("--length", type=int, help=f"tokens of the text (default {LENGTH})")
    parser.add_argument("--seed", type=int, default=0, help="of the text (default %(default)s)")
    parser.add_argument("--selectors", help=f"comma-separated, of {', '.join(SWEEPS)} (default all)")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """A row per selector and value.

    Raises:
        ValueError: a selector that is not there, or too short a text.
    """
    length = args.length or (QUICK_LENGTH if bench.quick else LENGTH)
    if length < 256:
        raise ValueError(f"--length: got {length}, expected at least 256")
    asked = args.selectors.split(",") if args.selectors else list(SWEEPS)
    if unknown := [name for name in asked if name not in SWEEPS]:
        raise ValueError(f"--selectors: got {', '.join(unknown)}, expected some of {', '.join(SWEEPS)}")
    kept = recorded(length, args.seed)
    dense_ms, all_lse = 0.0, []
    for q, k in kept:
        start = time.perf_counter()
        all_lse.append(la.attention(q, k, k, causal=True, return_lse=True)[1])
        dense_ms += 1e3 * (time.perf_counter() - start)
    rows: list[Row] = []
    for name in asked:
        parameter, values, make = SWEEPS[name]
        for value in values[::3] if bench.quick else values:
            bench.say(f"capture: {name}, {parameter} {value}")
            rows.append(
                {"keys": length, "layers": len(kept), "method": name, "parameter": f"{parameter} {value}"}
                | _kept_by(make(value), kept, all_lse)
                | {"dense_ms": dense_ms}
            )
    return {"rows": rows, "slopes": []}


def recorded(length: int, seed: int) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Queries and keys of each full layer of the demo's model over a text of its own kind."""
    haystack = text.haystack(length, 1, seed=seed, clear_head=1, clear_tail=64)
    session = runner.Session(runner.Model(), length)
    kept: dict[int, list[NDArray[np.float32]]] = {}

    def read(layer: int, q: NDArray[np.float32], store: la.KVStore) -> NDArray[np.float32]:
        kept.setdefault(layer, []).append(np.array(q))
        return runner.read_all(layer, q, store)

    for start in range(0, length, 1024):
        session.forward(haystack.tokens[start : start + 1024], read)
    return [(np.concatenate(q, axis=1), np.array(session.stores[layer].keys)) for layer, q in kept.items()]


def _kept_by(
    selector: Selector,
    kept: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]],
    all_lse: Sequence[NDArray[np.float32]],
) -> Row:
    """Density, mass and time of choosing, over the layers."""
    densities, shares, seconds = [], [], 0.0
    for (q, k), lse in zip(kept, all_lse, strict=True):
        start = time.perf_counter()
        chosen = selector(q, k, causal=True, scale=None)
        seconds += time.perf_counter() - start
        inside = la.sparse_attention(q, k, k[..., :1], chosen, causal=True, return_lse=True)[1]
        densities.append(chosen.density(causal=True))
        shares.append(np.exp(inside.astype(np.float64) - lse).ravel())
    mass = np.minimum(np.concatenate(shares), 1.0)
    return {
        "density": float(np.mean(densities)),
        "mass": float(mass.mean()),
        "mass_low": float(np.quantile(mass, 0.05)),
        "ms": 1e3 * seconds,
    }


def panels(result: Result) -> list[Panel | Bars]:
    """Mass against density, a line for each selector."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        lines.setdefault(row["method"], []).append((row["density"], row["mass"]))
    title = f"{result['rows'][0]['keys']} tokens of text, full layers of the demo's model" if lines else ""
    return [
        Panel(
            title,
            "density",
            "softmax mass inside",
            {name: sorted(line) for name, line in lines.items()},
            log_y=False,
            limit=1,
        )
    ]


def _tables(found: Sequence[Result]) -> list[str]:
    rows = all_rows(found, "capture")
    return ["", *table(rows, COLUMNS)] if rows else []


SECTIONS = (
    Section(
        "sparse",
        "capture",
        "What selectors for prompts keep",
        "Queries and keys of the demo's model over a text. `mass`: mean share of the softmax inside the mask; "
        "selection and dense attention of all full layers in ms.",
        _tables,
        whole("capture", panels),
    ),
)
