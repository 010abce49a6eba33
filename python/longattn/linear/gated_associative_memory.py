"""GAM: a gated sum of a short convolution and a softmax read of a learned bank."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like
from longattn._checks import integer, real
from longattn.dense.attention import attention
from longattn.linear._channels import optional, parameter, pointwise, product, storage_rows
from longattn.linear.convolution import causal_conv1d
from longattn.methods import Method
from longattn.reference import linear as reference


def gated_associative_memory(
    x: Array,
    conv: Array,
    bank: Array,
    w_gate: Array,
    *,
    conv_bias: Array | None = None,
    gate_bias: Array | None = None,
    bank_values: Array | None = None,
    heads: int = 1,
    scale: float = 1.0,
    residual: Array | None = None,
    initial_state: Array | None = None,
) -> tuple[Array, NDArray[np.float32]]:
    """`residual + sigmoid(gl) * conv(x) + sigmoid(gg) * softmax(scale * x bank^T) bank`, `gl, gg = split(x w_gate)`.

    Tokens are mixed by the convolution alone: the bank is learned and the same for all of them. The published method
    has one head, a scale of 1, and one bank for keys and values; the rest is ours.

    Args:
        x: input after its norm `[B, L, C]`; float32, float16 or bfloat16.
        conv: causal depthwise taps, floating `[C, w]`; the last tap meets the token itself.
        bank: keys, and values, of the bank, floating `[M, C]`.
        w_gate: floating `[C, 2 C]`.
        conv_bias: floating `[C]`.
        gate_bias: floating `[2 C]`.
        bank_values: values of the bank where they are not its keys, floating `[M, C]`.
        heads: heads that read the bank.
        scale: factor of the logits.
        residual: added to the result, any of the three dtypes `[B, L, C]`; `None` is none.
        initial_state: the `w - 1` inputs before the first, floating `[B, w - 1, C]`; `None` is zeros.

    Returns:
        `[B, L, C]` in the kind and dtype of `x`, and the last `w - 1` inputs, float32 `[B, w - 1, C]`. Arithmetic is
        float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `B * L * C * (w + 2 M + 2 C)` multiply-adds.

    References:
        R. Acharya, "Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling", 2025,
        arXiv:2509.00605.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    batch, _, channels = xn.shape
    number, factor = integer(heads, "heads", 1), real(scale, "scale")
    if channels % number or channels == 0:
        raise ValueError(f"heads: got {number}, expected a divisor of the {channels} channels of x")
    keys = parameter(bank, "bank", (None, channels), "[M, C]")
    if len(keys) == 0:
        raise ValueError(f"bank: got shape {keys.shape}, expected at least one slot")
    values = keys if bank_values is None else parameter(bank_values, "bank_values", keys.shape, "[M, C]")
    gates = parameter(w_gate, "w_gate", (channels, 2 * channels), "[C, 2 C]")
    added = optional(gate_bias, "gate_bias", (2 * channels,), "[2 C]")
    kept = None if residual is None else storage_rows(residual, "residual", xn.shape, "[B, L, C]")
    wide = np.ascontiguousarray(xn, np.float32)
    taps = parameter(conv, "conv", (channels, None), "[C, w]")
    shift = optional(conv_bias, "conv_bias", (channels,), "[C]")
    local, state = causal_conv1d(wide, taps, shift, initial_state=initial_state)

    def split(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return rows.reshape(*rows.shape[:-1], number, channels // number).swapaxes(-3, -2)

    def shared(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.broadcast_to(split(rows), (batch, number, len(rows), channels // number))

    read: Any = attention(split(wide), shared(keys), shared(values), scale=factor)
    logits = product(wide, gates)
    logits = logits if added is None else logits + added
    result = pointwise("sigmoid", logits[..., :channels], local)
    result += pointwise("sigmoid", logits[..., channels:], read.swapaxes(1, 2).reshape(xn.shape))
    if kept is not None:
        result += kept
    return like(x, result.astype(xn.dtype, copy=False)), state


METHOD = Method(
    name="gated_associative_memory",
    family="recurrent",
    title="Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling",
    year=2025,
    arxiv="2509.00605",
    function=gated_associative_memory,
    reference=reference.gated_associative_memory,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=False,
    checks=(
        "A closed gate of the bank and an open one of the convolution leave the convolution.",
        "The other way round it is attention to the bank.",
        "Tokens further back than the taps have no effect.",
        "A bank of one slot is read as its value.",
    ),
    tests="tests/linear/test_gated_associative_memory.py",
    cost="`B * L * C * (w + 2 M + 2 C)` multiply-adds.",
)
