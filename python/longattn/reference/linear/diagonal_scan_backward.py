"""Gradients of the scan of diagonal states with constant weights, token after token in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


def diagonal_scan_backward(
    d_out: Any,
    d_state: Any,
    x: Any,
    decay: Any,
    b: Any,
    c: Any,
    *,
    skip: Any = None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
) -> dict[str, NDArray[Any]]:
    """Gradients by name, complex throughout: with `D` that of `h_t`, back from the last token.

    D += conj(c) dy, dc += conj(h_t) dy, db += x D, d_decay += conj(h_(t-1)) D, dx = Re(conj(b) D) + skip dy, and then
    `D = conj(decay) D`.
    """
    x, d_out = np.asarray(x, np.float64), np.asarray(d_out, np.float64)
    decay, b, c = (np.asarray(w, np.complex128) for w in (decay, b, c))
    dx = d_out * (0 if skip is None else np.asarray(skip, np.float64))
    found = {name: np.zeros(decay.shape, np.complex128) for name in ("decay", "b", "c")}
    sequences = [(n, 0, x.shape[1]) for n in range(len(x))]
    if cu_seqlens is not None:
        sequences = [(0, int(a), int(z)) for a, z in pairwise(np.asarray(cu_seqlens))]
    first = np.zeros((len(sequences), *decay.shape), np.complex128)
    if initial_state is not None:
        first += np.asarray(initial_state)
    back = np.zeros(first.shape, np.complex128)
    if d_state is not None:
        back += np.asarray(d_state)
    for n, (entry, start, end) in enumerate(sequences):
        states = [first[n]]
        for t in range(start, end):
            states.append(decay * states[-1] + b * x[entry, t, :, None])
        for t in reversed(range(start, end)):
            dy = d_out[entry, t, :, None]
            d = back[n] + c.conj() * dy
            found["c"] += states[t - start + 1].conj() * dy
            found["b"] += x[entry, t, :, None] * d
            found["decay"] += states[t - start].conj() * d
            dx[entry, t] += (b.conj() * d).sum(-1).real
            back[n] = decay.conj() * d
    return {**found, "x": dx, "skip": (x * d_out).sum((0, 1)), "initial_state": back}
