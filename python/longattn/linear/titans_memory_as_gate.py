"""Titans' memory as a gate of attention in a window."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn._arrays import Array
from longattn._checks import finite, integer, one_of
from longattn.linear._channels import Float32, parameter, pointwise
from longattn.linear._documented import ENTRIES, documented
from longattn.linear._fast_weight import MemoryState
from longattn.linear._titans_layer import Part, TitansWeights, compose
from longattn.methods import Method
from longattn.reference import linear as reference

GATES = ("sigmoid", "silu")


@documented
def titans_memory_as_gate(
    x: Array,
    theta: Array | float,
    weights: TitansWeights,
    *,
    heads: int,
    window: int,
    norms: tuple[Array, Array] | None = None,
    gate: str = "sigmoid",
    eps: float = 1e-6,
    **options: Any,
) -> tuple[Array, MemoryState]:
    """Titans' memory as a gate (MAG): attention in a window, times a function of what the memory says.

    `norm(A(x)) * gate(norm(M(x)))`, where attention `A` is causal, in a window, and sees all persistent tokens.
    UNSURE: norms and gate, which the paper names without a formula; here rows over the root of their mean square.

    Args:
        x: {layer_rows}
        theta: {layer_rates}
        weights: `TitansWeights`.
        heads: {layer_heads}
        window: {layer_window}
        norms: factors of attention's and of the memory's channels after their norms, floating `[C]` each; `None` is 1.
        gate: "sigmoid" or "silu".
        eps: added to mean squares.
        options: {layer_options}

    Returns:
        {layer_states}

    Raises:
        {raises}

    Cost:
        {layer_cost}

    References:
        {titans}
    """
    one_of(gate, "gate", GATES)
    span = integer(window, "window", 1)
    eps = finite(eps, "eps", 0)
    if norms is not None and (not isinstance(norms, tuple | list) or len(norms) != 2):
        raise TypeError(f"norms: got {type(norms).__name__}, expected factors of attention and of the memory")

    def mix(part: Part) -> Float32:
        layer, rows = part.layer, part.rows
        factors: list[Any] = [1.0, 1.0]
        if norms is not None:
            factors = [parameter(w, f"norms[{i}]", rows.shape[2:], "[C]") for i, w in enumerate(norms)]
        seen = _root_norm(layer.attend(rows, layer.persistent, rows, span), eps) * factors[0]
        gated: Float32 = seen * pointwise(gate, _root_norm(part.learn(rows), eps) * factors[1])
        return gated

    return compose(x, weights, heads, {"theta": theta}, mix, **options)


def _root_norm(x: Float32, eps: float) -> Float32:
    """Rows over the root of their mean square."""
    normed: Float32 = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(eps))
    return normed


METHOD = Method(
    name="titans_memory_as_gate",
    family="recurrent",
    title="Titans: Learning to Memorize at Test Time",
    year=2024,
    arxiv="2501.00663",
    function=titans_memory_as_gate,
    reference=reference.titans_memory_as_gate,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "A row sees nothing of rows after it.",
        "A memory of zeros gates attention by a half.",
    ),
    tests="tests/linear/test_titans_layers.py",
    cost=ENTRIES["layer_cost"],
)
