"""The scan of diagonal states with constant weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import flag, result_array
from longattn.linear._channels import bounds_of, check_shape, optional, storage_rows


def diagonal_scan(
    x: Array,
    decay: Array,
    b: Array,
    c: Array,
    *,
    skip: Array | None = None,
    silu: bool = False,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, NDArray[Any]]:
    """`h = decay * h + b * x` and `y = Re(sum_n c * h) + skip * x`, token after token, for each channel.

    A call with one token and the state before it is the decode step. Decays are kept less 1, so that those near 1
    lose no precision in float32.

    Args:
        x: inputs `[B, L, C]`; float32, float16 or bfloat16.
        decay: `[C, N]`, floating or complex, of a magnitude of at most 1.
        b: input weights `[C, N]`, floating or complex.
        c: output weights `[C, N]`, floating or complex.
        skip: floating `[C]`; `None` is zeros.
        silu: `silu(y)` is returned.
        initial_state: states before the first token, `[B, C, N]`; `None` is zeros.
        cu_seqlens: bounds `[S + 1]` of sequences that a batch of 1 holds one after another; states are then
            `[S, C, N]`.
        out: memory for the result.

    Returns:
        `[B, L, C]` in the kind and dtype of `x`, and the states after the last token `[B, C, N]`, float32, or complex64
        if any weight is complex.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a decay of a magnitude above 1.

    Cost:
        `3 * B * L * C * N` multiply-adds, twice and a half as many for complex numbers.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    batch, length, channels = xn.shape
    arrays = {name: _weights(w, name) for name, w in (("decay", decay), ("b", b), ("c", c))}
    check_shape(arrays["decay"], "decay", (channels, None), "[C, N]")
    states = arrays["decay"].shape[1]
    for name in ("b", "c"):
        check_shape(arrays[name], name, (channels, states), "[C, N]")
    if not (np.abs(arrays["decay"]) <= 1 + 1e-12).all():
        raise ValueError("decay: got a magnitude above 1 or NaN, expected at most 1")
    start = None if initial_state is None else _weights(initial_state, "initial_state")
    is_complex = any(np.iscomplexobj(w) for w in (*arrays.values(), start) if w is not None)
    skips, activated = optional(skip, "skip", (channels,), "[C]"), flag(silu, "silu")
    bounds = bounds_of(cu_seqlens, batch, length)
    sequences = batch if bounds is None else len(bounds) - 1
    if start is not None:
        check_shape(start, "initial_state", (sequences, channels, states), "[B, C, N]")
    result = result_array(out, x, xn.shape, xn.dtype, {"x": xn})
    state = np.zeros((sequences, 2 if is_complex else 1, channels, states), np.float32)
    if start is not None:
        for part, values in enumerate(_parts(start, is_complex)):
            state[:, part] = values
    decays, inputs, outputs = (
        [np.ascontiguousarray(part, np.float32) for part in _parts(w, is_complex)]
        for w in (arrays["decay"] - 1, arrays["b"], arrays["c"])
    )
    _core.diagonal_scan(xn, decays, inputs, outputs, state, result, skip=skips, silu=activated, cu_seqlens=bounds)
    returned: Any = like(x, result) if out is None else out
    after: NDArray[Any] = state[:, 0] + 1j * state[:, 1] if is_complex else state[:, 0]
    return returned, np.ascontiguousarray(after, np.complex64 if is_complex else np.float32)


def _weights(x: Array, name: str) -> NDArray[Any]:
    """Floating or complex numbers in double precision."""
    if isinstance(x, np.ndarray) and np.iscomplexobj(x):
        return np.asarray(x, np.complex128)
    xn = as_numpy(x, name, any_strides=True)
    if xn.dtype.kind in "iub":
        raise TypeError(f"{name}: got dtype {xn.dtype}, expected a floating or complex dtype")
    return np.asarray(xn, np.float64)


def _parts(x: NDArray[Any], is_complex: bool) -> list[NDArray[Any]]:
    return [x.real, x.imag] if is_complex else [x.real]
