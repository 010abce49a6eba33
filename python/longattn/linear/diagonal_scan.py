"""The scan of diagonal states with constant weights."""

from __future__ import annotations

from typing import Any, NamedTuple

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
    given = checked(x, decay, b, c, skip, initial_state, cu_seqlens)
    xn, activated = given.x, flag(silu, "silu")
    result = result_array(out, x, xn.shape, xn.dtype, {"x": xn})
    decays, inputs, outputs = given.weights
    _core.diagonal_scan(
        xn, decays, inputs, outputs, given.state, result, skip=given.skip, silu=activated, cu_seqlens=given.bounds
    )
    returned: Any = like(x, result) if out is None else out
    return returned, joined(given.state)


class Scan(NamedTuple):
    """Checked arguments, as the compiled module takes them.

    Attributes:
        x: inputs.
        weights: decays less 1, input and output weights, each as its real (and imaginary) parts.
        state: states before the first token, float32 `[B, parts, C, N]`.
        skip: `[C]`, or `None`.
        bounds: of packed sequences, or `None`.
    """

    x: NDArray[Any]
    weights: list[list[NDArray[np.float32]]]
    state: NDArray[np.float32]
    skip: NDArray[np.float32] | None
    bounds: NDArray[np.int64] | None


def checked(
    x: Array,
    decay: Array,
    b: Array,
    c: Array,
    skip: Array | None,
    initial_state: Array | None,
    cu_seqlens: Array | None,
) -> Scan:
    """Arguments of a scan and of its gradients."""
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    batch, length, channels = xn.shape
    arrays = {name: numbers(w, name) for name, w in (("decay", decay), ("b", b), ("c", c))}
    check_shape(arrays["decay"], "decay", (channels, None), "[C, N]")
    states = arrays["decay"].shape[1]
    for name in ("b", "c"):
        check_shape(arrays[name], name, (channels, states), "[C, N]")
    if not (np.abs(arrays["decay"]) <= 1 + 1e-12).all():
        raise ValueError("decay: got a magnitude above 1 or NaN, expected at most 1")
    start = None if initial_state is None else numbers(initial_state, "initial_state")
    is_complex = any(np.iscomplexobj(w) for w in (*arrays.values(), start) if w is not None)
    skips = optional(skip, "skip", (channels,), "[C]")
    bounds = bounds_of(cu_seqlens, batch, length)
    sequences = batch if bounds is None else len(bounds) - 1
    state = np.zeros((sequences, 2 if is_complex else 1, channels, states), np.float32)
    if start is not None:
        check_shape(start, "initial_state", (sequences, channels, states), "[B, C, N]")
        for part, values in enumerate(parts(start, is_complex)):
            state[:, part] = values
    weights = [
        [np.ascontiguousarray(part, np.float32) for part in parts(w, is_complex)]
        for w in (arrays["decay"] - 1, arrays["b"], arrays["c"])
    ]
    return Scan(xn, weights, state, skips, bounds)


def numbers(x: Array, name: str) -> NDArray[Any]:
    """Floating or complex numbers in double precision."""
    if isinstance(x, np.ndarray) and np.iscomplexobj(x):
        return np.asarray(x, np.complex128)
    xn = as_numpy(x, name, any_strides=True)
    if xn.dtype.kind in "iub":
        raise TypeError(f"{name}: got dtype {xn.dtype}, expected a floating or complex dtype")
    return np.asarray(xn, np.float64)


def parts(x: NDArray[Any], is_complex: bool) -> list[NDArray[Any]]:
    """Real and, where they count, imaginary parts."""
    return [x.real, x.imag] if is_complex else [x.real]


def joined(state: NDArray[np.float32]) -> NDArray[Any]:
    """States `[B, C, N]` from their parts."""
    if state.shape[1] == 1:
        return np.ascontiguousarray(state[:, 0])
    return np.ascontiguousarray(state[:, 0] + 1j * state[:, 1], np.complex64)
