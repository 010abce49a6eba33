"""Memories that take one step per chunk, with its momentum, over the engine of those that take one per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from longattn._arrays import Array, as_numpy, like
from longattn._checks import integer, result_array
from longattn.linear._fast_weight import Float32, MemoryState, fast_weight, gate, moved

#: The rate of calls that only read.
RESTING = np.zeros((), np.float32)


def chunk_steps(
    q: Array,
    k: Array,
    v: Array,
    rate: Array | float,
    *,
    alpha: Array | float | None,
    eta: Array | float | None,
    weights: Sequence[Array] | None,
    initial_state: MemoryState | None,
    out_state: MemoryState | None,
    chunk_size: object,
    out: Array | None,
    **options: Any,
) -> tuple[Array, MemoryState]:
    """`S = eta S - sum_t rate_t u_t`, `W = (1 - alpha) W + S` once per chunk, whose queries read the `W` before it.

    Gates are those of the chunk's last row. Without decay and momentum the engine adds the steps of a chunk's gradients
    to its first weights, so their sum is the difference of both: it is as exact as the weights.

    Args:
        q: queries `[B, Hq, L, D]` or `[Hq, L, D]`.
        k: keys.
        v: values.
        rate: step sizes, at least 0, floating `[B, H, L]` or one number.
        alpha: what is forgotten, likewise.
        eta: momentum, likewise.
        weights: as of `fast_weight`.
        initial_state: what an earlier call returned, in place of `weights`.
        out_state: one whose arrays receive the last; `None` is arrays of its own.
        chunk_size: rows of a step.
        out: array for the output.
        options: further ones of `fast_weight`.

    Returns:
        `(output, state)`.
    """
    qn, kn, vn = (as_numpy(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    none = [x[..., :0, :] if x.ndim > 1 else x for x in (qn, kn, vn)]
    chunk, momentum = integer(chunk_size, "chunk_size", 1), None if eta is None else 0.0
    # A call without rows checks everything but lengths, and begins the state.
    _, state = fast_weight(
        none[0],
        none[1],
        none[2],
        RESTING,
        weights=weights,
        momentum=momentum,
        initial_state=initial_state,
        chunk_size=chunk,
        **options,
    )
    length = qn.shape[-2]
    for x, name in ((kn, "k"), (vn, "v")):
        if x.shape[-2] != length:
            raise ValueError(f"{name}: got shape {x.shape}, expected length {length} as in q")
    rates = gate(rate, str(options["rate_name"]), kn, high=None)
    forgotten = None if alpha is None else gate(alpha, "alpha", kn, high=1.0)
    slowed = None if eta is None else gate(eta, "eta", kn, high=1.0)
    result = result_array(out, q, (*qn.shape[:-1], vn.shape[-1]), qn.dtype, {"q": qn, "k": kn, "v": vn})
    live, step, frozen, position = state.live, state.step, state.frozen, state.position
    at, empty = 0, np.zeros(0, np.float32)
    while at < length:
        rows = slice(at, min(length, at + chunk - position))
        of_q, of_k, of_v = (x[..., rows, :] for x in (qn, kn, vn))
        began = MemoryState(live=frozen, step=empty, frozen=frozen, position=0, shapes=state.shapes)
        fast_weight(
            of_q,
            of_k,
            of_v,
            RESTING,
            weights=None,
            initial_state=began,
            chunk_size=chunk,
            out=result[..., rows, :],
            **options,
        )
        before = MemoryState(live=live, step=empty, frozen=frozen, position=position, shapes=state.shapes)
        own = rates[..., rows, 0].reshape(of_k.shape[:-1])
        _, after = fast_weight(of_k, of_k, of_v, own, weights=None, initial_state=before, chunk_size=chunk, **options)
        live, at, position = after.live, rows.stop, position + rows.stop - rows.start
        if position == chunk:
            gone: Float32 = live - frozen
            if slowed is not None:
                step = slowed[:, :, at - 1] * step + gone
                gone = step
            kept = frozen if forgotten is None else (1 - forgotten[:, :, at - 1]) * frozen
            live, position = kept + gone, 0
            frozen = live
    last = moved(MemoryState(live=live, step=step, frozen=frozen, position=position, shapes=state.shapes), out_state)
    returned: Any = like(q, result) if out is None else out
    return returned, last
