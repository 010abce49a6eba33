"""Titans' memory as context: attention over what the memory says of a segment, and the segment."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn._arrays import Array
from longattn._checks import integer
from longattn.linear._channels import Float32
from longattn.linear._documented import documented
from longattn.linear._fast_weight import MemoryState
from longattn.linear._titans_layer import Part, TitansWeights, compose
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def titans_memory_as_context(
    x: Array,
    theta: Array | float,
    weights: TitansWeights,
    *,
    heads: int,
    segment: int,
    alpha: Array | float | None = None,
    eta: Array | float | None = None,
    initial_state: MemoryState | None = None,
    **options: Any,
) -> tuple[Array, MemoryState]:
    """Titans' memory as context (MAC): attention in segments, over what the memory says of each, too.

    For a segment `S`: `h = M(S w_q)` of the memory before it, `y` is causal attention over `[persistent; h; S]`, the
    memory learns `y`, and the output is `y * M(y)`, a row at a time after its own step. All of `h` comes before `S`,
    as the paper has it: a row sees what the memory says of later rows of its segment, so that segments, not rows, are
    causal.

    Args:
        x: {layer_rows}
        theta: {layer_rates}
        weights: `TitansWeights`.
        heads: {layer_heads}
        segment: rows of a segment; the last one may be shorter.
        alpha: what the memory forgets, likewise; `None` is 0.
        eta: its momentum, likewise; `None` is 0.
        initial_state: what a call with the segments before returned.
        options: {layer_options}

    Returns:
        {layer_states}

    Raises:
        {raises}

    Cost:
        Projections, `B * L * heads * (P + 1.5 * segment) * (D + Dv)` multiply-adds of attention, and the memory twice.

    References:
        {titans}
    """

    def mix(part: Part) -> Float32:
        layer, rows = part.layer, part.rows
        mixed = layer.attend(rows, np.concatenate([layer.persistent, part.ask(rows)], axis=1), rows, None)
        return mixed * part.learn(mixed)

    options["initial_state"] = initial_state
    gates = {"theta": theta, "alpha": alpha, "eta": eta}
    return compose(x, weights, heads, gates, mix, segment=integer(segment, "segment", 1), **options)


METHOD = Method(
    name="titans_memory_as_context",
    family="recurrent",
    title="Titans: Learning to Memorize at Test Time",
    year=2024,
    arxiv="2501.00663",
    function=titans_memory_as_context,
    reference=reference.titans_memory_as_context,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Segments in calls of their own that hand the memory on give those of one call.",
        "A segment sees nothing of segments after it.",
    ),
    tests="tests/linear/test_titans_layers.py",
    cost="Projections, `B * L * heads * (P + 1.5 * segment) * (D + Dv)` multiply-adds of attention, and the "
    "memory twice.",
)
