"""Gradients of the scan of diagonal states with constant weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, like
from longattn.linear._channels import check_shape, storage_rows
from longattn.linear.diagonal_scan import checked, joined, numbers, parts


@dataclass(frozen=True, slots=True)
class DiagonalScanGradients:
    """Gradients by the arguments of `diagonal_scan`, in their shapes.

    Those of complex numbers are complex: by the real part, plus `1j` times that by the imaginary part.

    Attributes:
        dx: by inputs, in their kind and dtype.
        d_decay: by decays; this and what follows is float32, or complex64 where the argument is complex.
        db: by input weights.
        dc: by output weights.
        d_skip: by the weights of inputs in outputs; `None` where there are none.
        d_initial_state: by the states before the first token.
    """

    dx: Array
    d_decay: NDArray[Any]
    db: NDArray[Any]
    dc: NDArray[Any]
    d_skip: NDArray[np.float32] | None
    d_initial_state: NDArray[Any]


def diagonal_scan_backward(
    d_out: Array,
    d_state: Array | None,
    x: Array,
    decay: Array,
    b: Array,
    c: Array,
    *,
    skip: Array | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
) -> DiagonalScanGradients:
    """Gradients of `h = decay * h + b * x`, `y = Re(sum_n c * h) + skip * x`, by everything that goes in.

    Sequences are walked from their last token to their first; states are made anew. `longattn.torch` makes this part of
    torch's autograd.

    Args:
        d_out: gradient of the output `[B, L, C]`; float32, float16 or bfloat16. That of `silu` is the caller's.
        d_state: gradient of the final states `[B, C, N]`, floating or complex; `None` is zero.
        x: inputs, as in the forward call.
        decay: `[C, N]`, likewise.
        b: likewise.
        c: likewise.
        skip: likewise.
        initial_state: likewise.
        cu_seqlens: likewise.

    Returns:
        `DiagonalScanGradients`. Arithmetic is float32, the same bits for any number of threads.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a decay of a magnitude above 1.

    Cost:
        Three to four times the forward call; a state for every 64 tokens of memory.
    """
    given = checked(x, decay, b, c, skip, initial_state, cu_seqlens)
    xn, (sequences, count, channels, states) = given.x, given.state.shape
    rows = storage_rows(d_out, "d_out", xn.shape, "[B, L, C] as x")
    d_states = np.zeros(given.state.shape, np.float32)
    if d_state is not None:
        after = numbers(d_state, "d_state")
        check_shape(after, "d_state", (sequences, channels, states), "[B, C, N]")
        if np.iscomplexobj(after) and count == 1:
            raise TypeError("d_state: got complex numbers, expected floating ones: all weights are")
        for part, values in enumerate(parts(after, count == 2)):
            d_states[:, part] = values
    dx = np.empty(xn.shape, np.float32)
    made = [[np.empty((channels, states), np.float32) for _ in range(count)] for _ in range(3)]
    d_skip = np.empty(channels, np.float32)
    (decays, inputs, outputs), (of_decays, of_inputs, of_outputs) = given.weights, made
    _core.diagonal_scan_backward(
        xn, decays, inputs, outputs, given.state, rows, dx, of_decays, of_inputs, of_outputs, d_skip, d_states,
        skip=given.skip, cu_seqlens=given.bounds,
    )  # fmt: skip
    found = [joined(np.stack(w)[None])[0] for w in made]
    found = [
        y if np.iscomplexobj(numbers(w, n)) else y.real for y, w, n in zip(found, (decay, b, c), "dbc", strict=True)
    ]
    first = joined(d_states)
    if initial_state is not None and not np.iscomplexobj(numbers(initial_state, "initial_state")):
        first = first.real
    return DiagonalScanGradients(
        like(x, dx.astype(xn.dtype, copy=False)), found[0], found[1], found[2], None if skip is None else d_skip, first
    )
