"""Mega's damped moving average of several dimensions per channel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like
from longattn._checks import flag
from longattn.linear._channels import optional, parameter, pointwise, storage_rows
from longattn.linear.diagonal_scan import diagonal_scan
from longattn.methods import Method
from longattn.reference import linear as reference

Parameters = tuple[Array, Array, Array, Array]


def multi_dim_damped_ema(
    x: Array,
    alpha: Array,
    delta: Array,
    beta: Array,
    gamma: Array,
    *,
    omega: Array | None = None,
    silu: bool = False,
    backward: Parameters | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
) -> tuple[Array, NDArray[np.float32]]:
    """N damped moving averages per channel.

    With `p = sigmoid(alpha)` and `d = sigmoid(delta)`, token after token,

        h = (1 - p d) h + p beta x,   y = N ** -0.5 * sum_n gamma h + omega x

    Scans cost less than a transform of the equivalent kernel, and take any state. With `backward`,
    a second set of averages adds what comes after a token, `sum_{j > t} K2[j - t] x_j`; the token itself is not part.

    Args:
        x: `[B, L, C]`; float32, float16 or bfloat16.
        alpha: floating `[C, N]`.
        delta: floating `[C, N]`.
        beta: floating `[C, N]`.
        gamma: floating `[C, N]`.
        omega: floating `[C]`; `None` is zeros.
        silu: `silu(y)` is returned, as Mega does.
        backward: `(alpha, delta, beta, gamma)` of the averages of what comes after.
        initial_state: states before the first token, floating `[B, C, N]`; `None` is zeros.
        cu_seqlens: bounds `[S + 1]` of sequences that a batch of 1 holds one after another; not with `backward`.

    Returns:
        `[B, L, C]` in the kind and dtype of `x`, and the states after the last token, float32 `[B, C, N]`, of the
        averages of what came before.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or parameters that are not finite.

    Cost:
        `3 * B * L * C * N` multiply-adds per direction.

    References:
        X. Ma, C. Zhou, X. Kong, J. He, L. Gui, G. Neubig, J. May, L. Zettlemoyer, "Mega: Moving Average Equipped Gated
        Attention", 2022, arXiv:2209.10655.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    channels = xn.shape[2]
    decay, inputs, outputs = weights_of((alpha, delta, beta, gamma), ("alpha", "delta", "beta", "gamma"), channels)
    skip, activated = optional(omega, "omega", (channels,), "[C]"), flag(silu, "silu")
    if backward is None:
        y, state = diagonal_scan(
            xn, decay, inputs, outputs, skip=skip, silu=activated, initial_state=initial_state, cu_seqlens=cu_seqlens
        )
        return like(x, y), state
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: got bounds with backward, expected None")
    if not isinstance(backward, tuple | list) or len(backward) != 4:
        raise TypeError(f"backward: got {type(backward).__name__}, expected (alpha, delta, beta, gamma)")
    names = ("backward[0]", "backward[1]", "backward[2]", "backward[3]")
    later = weights_of(tuple(backward), names, channels)
    wide = np.ascontiguousarray(xn, np.float32)
    own, state = diagonal_scan(wide, decay, inputs, outputs, skip=skip, initial_state=initial_state)
    # Averages of the tokens after: those of a sequence that is one token ahead.
    shifted = np.zeros_like(wide)
    shifted[:, :-1] = wide[:, 1:]
    after, _ = diagonal_scan(shifted[:, ::-1], later[0], later[1], later[0] * later[2])
    result = own + after[:, ::-1]
    if activated:
        result = pointwise("silu", result)
    return like(x, result.astype(xn.dtype, copy=False)), state


def weights_of(parameters: tuple[Any, ...], names: tuple[str, ...], channels: int) -> tuple[NDArray[np.float64], ...]:
    """Decay, input weights and output weights `[C, N]` of the averages."""
    found: list[NDArray[np.float64]] = []
    for value, name in zip(parameters, names, strict=True):
        w = parameter(value, name, found[0].shape if found else (channels, None), "[C, N]", np.float64)
        if not np.isfinite(w).all():
            raise ValueError(f"{name}: got NaN or infinity, expected finite numbers")
        found.append(w)
    alpha, delta, beta, gamma = found
    p, d = (0.5 * (1 + np.tanh(0.5 * w)) for w in (alpha, delta))
    return 1 - p * d, p * beta, gamma * max(alpha.shape[1], 1) ** -0.5


METHOD = Method(
    name="multi_dim_damped_ema",
    family="recurrent",
    title="Mega: Moving Average Equipped Gated Attention",
    year=2022,
    arxiv="2209.10655",
    function=multi_dim_damped_ema,
    reference=reference.multi_dim_damped_ema,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=False,
    checks=(
        "It is the convolution with the kernel of its powers, in either direction.",
        "One dimension without damping is the classic moving average.",
        "Any split of a sequence gives the same as the whole.",
    ),
    tests="tests/linear/test_mega_gated_attention.py",
    cost="`3 * B * L * C * N` multiply-adds per direction.",
)
