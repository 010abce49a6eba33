"""Short convolutions: depthwise along one axis or two, and with taps that depend on the token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, like
from longattn._checks import flag, result_array
from longattn.linear._channels import bounds_of, optional, parameter, storage_rows


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    silu: bool = False,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, NDArray[np.float32]]:
    """Depthwise convolution with the token itself and those before it, `y[t] = sum_j weight[:, K - 1 - j] * x[t - j]`.

    A call with one token and the state before it is the decode step.

    Args:
        x: `[B, L, C]`; float32, float16 or bfloat16.
        weight: floating `[C, K]`; the last tap meets the token itself.
        bias: floating `[C]`.
        silu: `silu(y)` is returned.
        initial_state: the `K - 1` rows before the first, floating `[B, K - 1, C]`; `None` is zeros.
        cu_seqlens: bounds `[S + 1]` of sequences that a batch of 1 holds one after another; states are then
            `[S, K - 1, C]`.
        out: memory for the result.

    Returns:
        `[B, L, C]` in the kind and dtype of `x`, and the last `K - 1` rows, float32 `[B, K - 1, C]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        `B * L * C * K` multiply-adds.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    batch, length, channels = xn.shape
    taps = parameter(weight, "weight", (channels, None), "[C, K]")
    kept = taps.shape[1] - 1
    if kept < 0:
        raise ValueError(f"weight: got shape {taps.shape}, expected at least one tap")
    biases, activated = optional(bias, "bias", (channels,), "[C]"), flag(silu, "silu")
    bounds = bounds_of(cu_seqlens, batch, length)
    sequences = batch if bounds is None else len(bounds) - 1
    before = optional(initial_state, "initial_state", (sequences, kept, channels), "[B, K - 1, C]")
    result = result_array(out, x, xn.shape, xn.dtype, {"x": xn})
    _core.depthwise(
        xn[:, None], np.ascontiguousarray(taps.T[None]), (0, kept), result[:, None], bias=biases,
        before=None if before is None else before[None], silu=activated, cu_seqlens=bounds,
    )  # fmt: skip
    state = np.zeros((sequences, kept, channels), np.float32)
    for s in range(sequences):
        rows = xn[s] if bounds is None else xn[0, bounds[s] : bounds[s + 1]]
        own = min(kept, len(rows))
        if before is not None:
            state[s, : kept - own] = before[s, own:]
        state[s, kept - own :] = rows[len(rows) - own :]
    returned: Any = like(x, result) if out is None else out
    return returned, state


def depthwise_conv1d(x: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None) -> Array:
    """Depthwise convolution around each token, zeros outside: tap `(K - 1) // 2` meets the token itself.

    Args:
        x: `[B, L, C]`; float32, float16 or bfloat16.
        weight: floating `[C, K]`, not flipped.
        bias: floating `[C]`.
        out: memory for the result.

    Returns:
        `[B, L, C]` in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        `B * L * C * K` multiply-adds.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    taps = parameter(weight, "weight", (xn.shape[2], None), "[C, K]")
    biases = optional(bias, "bias", (xn.shape[2],), "[C]")
    if taps.shape[1] == 0:
        raise ValueError(f"weight: got shape {taps.shape}, expected at least one tap")
    result = result_array(out, x, xn.shape, xn.dtype, {"x": xn})
    centre = (0, (taps.shape[1] - 1) // 2)
    _core.depthwise(xn[:, None], np.ascontiguousarray(taps.T[None]), centre, result[:, None], bias=biases)
    return like(x, result) if out is None else out


def depthwise_conv2d(x: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None) -> Array:
    """Depthwise cross-correlation of a map with zeros outside, stride 1: tap `[kh // 2, kw // 2]` meets the place.

    Args:
        x: `[B, H, W, C]`; float32, float16 or bfloat16.
        weight: floating `[C, kh, kw]`, not flipped.
        bias: floating `[C]`.
        out: memory for the result.

    Returns:
        `[B, H, W, C]` in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        `B * H * W * C * kh * kw` multiply-adds.
    """
    xn = storage_rows(x, "x", (None, None, None, None), "[B, H, W, C]")
    taps = parameter(weight, "weight", (xn.shape[3], None, None), "[C, kh, kw]")
    biases = optional(bias, "bias", (xn.shape[3],), "[C]")
    if taps.size == 0 and xn.shape[3]:
        raise ValueError(f"weight: got shape {taps.shape}, expected at least one tap")
    result = result_array(out, x, xn.shape, xn.dtype, {"x": xn})
    centre = (taps.shape[1] // 2, taps.shape[2] // 2)
    _core.depthwise(xn, np.ascontiguousarray(taps.transpose(1, 2, 0)), centre, result, bias=biases)
    return like(x, result) if out is None else out


def dynamic_conv(
    v: Array,
    w: Array,
    *,
    softmax: bool = False,
    causal: bool = False,
    initial_state: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Convolution whose taps are given per token and head, `y[i] = sum_t w[i, t] * v[i + t - centre]`.

    The centre is `(K - 1) // 2`, or with `causal` `K - 1`. Values outside the sequence are zeros, and weights are not
    normalised again for them.

    Args:
        v: values `[B, H, L, D]`; float32, float16 or bfloat16.
        w: weights `[B, H, L, K]`; any of the three dtypes.
        softmax: weights are the softmax of `w` over the taps.
        causal: taps reach back only.
        initial_state: values before the first token, any of the three dtypes `[B, H, n, D]`, the last one nearest;
            with `causal` only.
        out: memory for the result.

    Returns:
        `[B, H, L, D]` in the kind and dtype of `v`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, no tap, or a state without `causal`.

    Cost:
        `B * H * L * D * K` multiply-adds.
    """
    vn = storage_rows(v, "v", (None, None, None, None), "[B, H, L, D]")
    wn = storage_rows(w, "w", (*vn.shape[:3], None), "[B, H, L, K]")
    normalised, back = flag(softmax, "softmax"), flag(causal, "causal")
    taps = wn.shape[3]
    if taps == 0:
        raise ValueError(f"w: got shape {wn.shape}, expected at least one tap")
    before = None
    if initial_state is not None:
        if not back:
            raise ValueError("initial_state: got one without causal, expected None")
        shape = (*vn.shape[:2], None, vn.shape[3])
        before = storage_rows(initial_state, "initial_state", shape, "[B, H, n, D]")
    inputs = {"v": vn, "w": wn, "initial_state": before}
    result = result_array(out, v, vn.shape, vn.dtype, inputs)
    _core.dynamic_convolution(vn, wn, taps - 1 if back else (taps - 1) // 2, normalised, result, before=before)
    return like(v, result) if out is None else out
