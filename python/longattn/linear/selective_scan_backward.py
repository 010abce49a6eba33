"""Gradients of the selective scan, from what the forward call was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, like
from longattn._checks import flag
from longattn.linear._channels import bounds_of, optional, parameter, storage_rows


@dataclass(frozen=True, slots=True)
class SelectiveScanGradients:
    """Gradients by the arguments of `selective_scan`, in their shapes.

    Attributes:
        dx: by inputs, in their dtype.
        d_dt: by step sizes, in their dtype.
        da: by rates, float32.
        db: by input weights, in their dtype.
        dc: by output weights, in their dtype.
        d_skip: by the weights of inputs in outputs, float32 `[E]`.
        d_dt_bias: by what is added to step sizes, float32 `[E]`.
        dz: by gates, in their dtype; `None` where there are none.
        d_initial_state: by the states before the first token, float32.
    """

    dx: Array
    d_dt: Array
    da: Array
    db: Array
    dc: Array
    d_skip: Array
    d_dt_bias: Array
    dz: Array | None
    d_initial_state: Array


def selective_scan_backward(
    d_out: Array,
    d_state: Array | None,
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    *,
    skip: Array | None = None,
    dt_bias: Array | None = None,
    softplus: bool = False,
    z: Array | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
) -> SelectiveScanGradients:
    """Gradients of `longattn.linear.selective_scan` by everything that goes in.

    States before every sixteenth token are made anew and kept, for 64 channels of a sequence at a time; from the last
    token to the first, the states between them are made once more. `longattn.torch` makes this part of torch's
    autograd.

    Args:
        d_out: gradient of the output, its shape; float32, float16 or bfloat16.
        d_state: gradient of the final states, floating, in their shape; `None` is zero.
        x: inputs `[B, L, E]`, as in the forward call; so are all that follow.
        dt: step sizes `[B, L, E]`.
        a: rates `[E, N]`.
        b: input weights `[B, L, N]`.
        c: output weights `[B, L, N]`.
        skip: floating `[E]`; `None` is zeros.
        dt_bias: floating `[E]`; `None` is zeros.
        softplus: step sizes are `ln(1 + exp(dt + dt_bias))`.
        z: gate `[B, L, E]`.
        initial_state: states before the first token, floating `[B, E, N]`; `None` is zeros.
        cu_seqlens: bounds of packed sequences.

    Returns:
        `SelectiveScanGradients` in the kind of `x`. Arithmetic is float32, the same bits for any number of threads.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a rate above 0 or not finite, a step size that is negative, NaN or
            infinite.

    Cost:
        About four times the forward call: three exponentials per state and token. Memory beyond the gradients, which
        are made in float32: `B * L * N * E / 32` numbers, shares of blocks of channels in `db` and `dc`, and per thread
        `4 * L * N` numbers, the states kept.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, E]")
    batch, length, channels = xn.shape
    dtn = storage_rows(dt, "dt", xn.shape, "[B, L, E]")
    an = parameter(a, "a", (channels, None), "[E, N]")
    states = an.shape[1]
    if not (np.isfinite(an) & (an <= 0)).all():
        raise ValueError("a: got a rate that is above 0 or not finite, expected finite rates of at most 0")
    bn = storage_rows(b, "b", (batch, length, states), "[B, L, N]")
    cn = storage_rows(c, "c", (batch, length, states), "[B, L, N]")
    zn = None if z is None else storage_rows(z, "z", xn.shape, "[B, L, E]")
    given = storage_rows(d_out, "d_out", xn.shape, "[B, L, E]")
    skips, biases = optional(skip, "skip", (channels,), "[E]"), optional(dt_bias, "dt_bias", (channels,), "[E]")
    through = flag(softplus, "softplus")
    bounds = bounds_of(cu_seqlens, batch, length)
    shape = (batch if bounds is None else len(bounds) - 1, channels, states)
    first = np.zeros(shape, np.float32)
    if initial_state is not None:
        first = parameter(initial_state, "initial_state", shape, "[B, E, N]")
    d_first = np.zeros(shape, np.float32)
    if d_state is not None:
        d_first[...] = parameter(d_state, "d_state", shape, "[B, E, N]")
    dx, d_dt, db, dc = (np.empty(w.shape, np.float32) for w in (xn, dtn, bn, cn))
    dz = None if zn is None else np.empty(zn.shape, np.float32)
    da, d_skip, d_bias = np.empty(an.shape, np.float32), np.empty(channels, np.float32), np.empty(channels, np.float32)
    _core.selective_scan_backward(
        xn,
        dtn,
        an,
        bn,
        cn,
        first,
        given,
        dx,
        d_dt,
        da,
        db,
        dc,
        d_skip,
        d_bias,
        d_first,
        skip=skips,
        dt_bias=biases,
        softplus=through,
        z=zn,
        dz=dz,
        cu_seqlens=bounds,
    )

    def rounded(d: NDArray[np.float32], of: NDArray[Any]) -> Array:
        return like(x, d.astype(of.dtype, copy=False))

    return SelectiveScanGradients(
        rounded(dx, xn),
        rounded(d_dt, dtn),
        like(x, da),
        rounded(db, bn),
        rounded(dc, cn),
        like(x, d_skip),
        like(x, d_bias),
        None if dz is None or zn is None else rounded(dz, zn),
        like(x, d_first),
    )
