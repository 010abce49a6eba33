"""Lightning attention: linear attention with a fixed decay per head."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import all_within, check_floating, integer, shape_of
from longattn.linear._anywhere import recurrence_anywhere
from longattn.linear._documented import COST, documented
from longattn.linear._recurrence import CHUNK, Common
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def lightning_attention(
    q: Array,
    k: Array,
    v: Array,
    slopes: Array,
    *,
    scale: float = 1.0,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Linear attention with a decay per head, `S_t = e^-s S_(t-1) + k_t v_t^T`, `o_t = scale * q_t^T S_t`.

    There is no divisor; models put a norm after it.

    Args:
        q: {queries}
        k: {keys}
        v: {values}
        slopes: `s >= 0`, floating `[H]`; `longattn.linear.lightning_slopes` has those of published models.
        scale: factor of outputs.
        initial_state: {initial_state}
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        {states}

    {gpu}

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or slopes below 0.

    Cost:
        {cost}

    References:
        Z. Qin et al., "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", 2024,
        arXiv:2405.17381.
    """
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens, out)
    return recurrence_anywhere(q, k, v, common, of_heads=("slopes", slopes, _log_decays))


def lightning_slopes(heads: int, layer: int = 0, layers: int = 1) -> NDArray[np.float32]:
    """Slopes of published models: those of ALiBi, smaller in later layers.

    With `heads` no power of two, the slopes of the next smaller power come first, then every second one of the next
    larger power. The factor of a layer is `1 - layer / (layers - 1) + 1e-5`, that of a single layer `1 + 1e-5`.

    Args:
        heads: number of heads.
        layer: the layer, from 0.
        layers: number of layers.

    Returns:
        float32 `[heads]`.

    Raises:
        TypeError: an argument that is no integer.
        ValueError: no head, or a layer that is not among the layers.
    """
    heads, layers = integer(heads, "heads", 1), integer(layers, "layers", 1)
    layer = integer(layer, "layer", 0, layers - 1)
    power = 1 << (heads.bit_length() - 1)
    first = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    rest = 2.0 ** (-4 * np.arange(1, 2 * power + 1) / power)
    slopes = np.concatenate([first, rest[::2]])[:heads]
    found: NDArray[np.float32] = (slopes * (1 - layer / max(layers - 1, 1) + 1e-5)).astype(np.float32)
    return found


def _log_decays(slopes: Array, v: Array) -> NDArray[Any]:
    """`-slopes` of every head, one for all rows."""
    x = as_numpy(slopes, "slopes", any_strides=True)
    check_floating(x, "slopes")
    shape = shape_of(v, "v")
    heads = shape[-3] if len(shape) > 2 else 0
    if x.shape != (heads,):
        raise ValueError(f"slopes: got shape {x.shape}, expected {(heads,)}, one per head of v")
    if not all_within(x, 0, np.inf):
        raise ValueError("slopes: got a number below 0 or NaN, expected numbers of at least 0")
    return -x


METHOD = Method(
    name="lightning_attention",
    family="linear",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    year=2024,
    arxiv="2405.17381",
    function=lightning_attention,
    reference=reference.lightning_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "Slopes of 0 give plain linear attention without a divisor.",
        "Slopes towards infinity give `(q_t . k_t) v_t`.",
        "It is retention with `gamma = e^-s` and a scale of 1.",
    ),
    tests="tests/linear/test_lightning_attention.py",
    cost=COST,
)
