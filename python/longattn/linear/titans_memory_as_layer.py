"""Titans' memory as a layer before attention in a window."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn._arrays import Array
from longattn._checks import integer
from longattn.linear._channels import Float32
from longattn.linear._documented import ENTRIES, documented
from longattn.linear._fast_weight import MemoryState
from longattn.linear._titans_layer import Part, TitansWeights, compose
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def titans_memory_as_layer(
    x: Array, theta: Array | float, weights: TitansWeights, *, heads: int, window: int, **options: Any
) -> tuple[Array, MemoryState]:
    """Titans' memory as a layer (MAL): attention in a window over what the memory says of the rows.

    The memory learns the persistent tokens, then the rows; what it says of the former all rows see.

    Args:
        x: {layer_rows}
        theta: rates of the memory, floating `[B, heads, P + L]` or one number.
        weights: `TitansWeights`.
        heads: {layer_heads}
        window: {layer_window}
        options: further ones of `titans_neural_memory`, gates with `P + L` rows, too: `weights` of the memory are
            `memory_weights` here.

    Returns:
        {layer_states}

    Raises:
        {raises}

    Cost:
        {layer_cost}

    References:
        {titans}
    """
    span = integer(window, "window", 1)

    def mix(part: Part) -> Float32:
        layer, first = part.layer, part.layer.persistent.shape[1]
        said = part.learn(np.concatenate([layer.persistent, part.rows], axis=1))
        return layer.attend(said[:, first:], said[:, :first], said[:, first:], span)

    return compose(x, weights, heads, {"theta": theta}, mix, **options)


METHOD = Method(
    name="titans_memory_as_layer",
    family="recurrent",
    title="Titans: Learning to Memorize at Test Time",
    year=2024,
    arxiv="2501.00663",
    function=titans_memory_as_layer,
    reference=reference.titans_memory_as_layer,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "A row sees nothing of rows after it.",
        "A window of 1 without persistent tokens reads the memory alone.",
    ),
    tests="tests/linear/test_titans_layers.py",
    cost=ENTRIES["layer_cost"],
)
