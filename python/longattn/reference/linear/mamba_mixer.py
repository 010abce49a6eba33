"""Mamba blocks and what is made of them, from their formulas, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.linear.convolution import depthwise
from longattn.reference.linear.selective_scan import selective_scan, silu

Float64 = NDArray[np.float64]


def wide(x: Any) -> Float64:
    """As float64."""
    return np.asarray(x, np.float64)


def mamba_mixer(x: ArrayLike, weights: Any) -> Float64:
    """`[B, L, Co]` of `[B, L, C]`; see `longattn.linear.mamba_mixer`."""
    x = wide(x)
    y = scan(convolved(x @ wide(weights.w_in), weights), weights)
    if weights.w_gate is not None:
        y = y * silu(x @ wide(weights.w_gate))
    return y if weights.w_out is None else y @ wide(weights.w_out)


def convolved(h: Float64, weights: Any) -> Float64:
    """The short convolution and its activation."""
    if weights.conv is None:
        return h
    return silu(depthwise(h, weights.conv, (weights.conv.shape[1] - 1,), weights.conv_bias))


def scan(h: Float64, weights: Any) -> Float64:
    """The scan of rows with weights that are projections of them."""
    w = weights.w_dt
    dt = h @ wide(w[0]) @ wide(w[1]) if isinstance(w, tuple) else h @ wide(w)
    y, _ = selective_scan(
        h, dt, weights.a, h @ wide(weights.w_b), h @ wide(weights.w_c), skip=weights.skip, dt_bias=weights.dt_bias,
        softplus=True,
    )  # fmt: skip
    return y


def bidirectional_mamba(
    x: ArrayLike,
    forward: Any,
    backward: Any,
    *,
    inner: bool = False,
    merge: str = "add",
    w_merge: ArrayLike | None = None,
) -> Float64:
    """See `longattn.linear.bidirectional_mamba`."""
    x = wide(x)
    if inner:
        h = x @ wide(forward.w_in)
        y = scan(convolved(h, forward), forward) + scan(convolved(h[:, ::-1], backward), backward)[:, ::-1]
        if forward.w_gate is not None:
            y = y * silu(x @ wide(forward.w_gate))
        return y if forward.w_out is None else y @ wide(forward.w_out)
    one, two = mamba_mixer(x, forward), mamba_mixer(x[:, ::-1], backward)[:, ::-1]
    if merge == "add":
        return one + two
    both = np.concatenate([one, two], axis=-1)
    return both if w_merge is None else both @ wide(w_merge)


def selective_token_channel_mixer(
    x: ArrayLike,
    layers: Any,
    *,
    averaging: Any = None,
    directions: str = "forward",
    size: tuple[int, int] | None = None,
) -> Float64:
    """See `longattn.linear.selective_token_channel_mixer`."""
    x = wide(x)
    orders = {"forward": ["forward"], "both": ["forward", "back"], "cross": ["forward", "back", "down", "up"]}[
        directions
    ]
    tokens, channels = [x], [x]
    for number, (token, channel) in enumerate(layers):
        if averaging is None:
            source = channels[-1]
        else:
            a, b = wide(averaging[0])[number], wide(averaging[1])[number]
            source = sum(a[i] * tokens[i] + b[i] * channels[i] for i in range(number + 1))
        tokens.append(mixed(source, token, orders, size))
        if averaging is None:
            source = tokens[-1]
        else:
            c, d = wide(averaging[2])[number], wide(averaging[3])[number]
            source = sum(c[i] * tokens[i] for i in range(number + 2))
            source = source + sum(d[i] * channels[i] for i in range(number + 1))
        channels.append(mixed(source.swapaxes(1, 2), channel, ["forward", "back"], None).swapaxes(1, 2))
    return channels[-1]


def mixed(x: Float64, weights: Any, orders: list[str], size: tuple[int, int] | None) -> Float64:
    """Scans in several orders, added up, between the projections."""
    h = convolved(x @ wide(weights.w_in), weights)
    length = x.shape[1]
    index = np.arange(length)
    total = np.zeros_like(h)
    for order in orders:
        place = index if order in {"forward", "back"} else index.reshape(size).T.reshape(-1)
        if order in {"back", "up"}:
            place = place[::-1]
        total[:, place] += scan(h[:, place], weights)
    if weights.w_gate is not None:
        total = total * silu(x @ wide(weights.w_gate))
    return total if weights.w_out is None else total @ wide(weights.w_out)
