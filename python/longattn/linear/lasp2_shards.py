"""LASP-2's algebra of states, a step at a time: for sequences that lie on several workers of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_floating, items_of
from longattn.linear._recurrence import Common, by_rows, checked

Float32 = NDArray[np.float32]


def shard_state(k: Array, v: Array, *, g: Array | None = None, beta: Array | None = None) -> tuple[Array, Float32]:
    """States pass: what a stretch of a sequence adds to the state, and how it decays what comes in.

    A stretch turns a state `S` into `e^decay S + state`, whatever `S` is, so all stretches make these at once and send
    them to each other; `exclusive_states` then gives the state before each, with which any function of
    `longattn.linear` without a delta rule, or of `longattn.torch`, computes its outputs:

        state, decay = shard_state(k, v, g=g)                       # on every worker, then one gather
        before, last = exclusive_states(states, decays)             # on every worker
        out, _ = gated_linear_attention(q, k, v, g, initial_state=before[me])

    Args:
        k: keys `[B, Hk, L, D]`, or `[Hk, L, D]`; float32, float16 or bfloat16.
        v: values `[B, H, L, Dv]`, `H` a multiple of `Hk`; any of the three dtypes.
        g: log decays, at most 0, floating `[H]`, `[B, H, L]` or `[B, H, L, D]`; `None` is no decay.
        beta: factors of updates, finite, floating `[B, H, L]`; `None` is 1.

    Returns:
        `(state, decay)`: float32 `[B, H, D, Dv]` in the kind of `k`, and the sum of the log decays, float32 `[B, H, 1]`
        or `[B, H, D]` (without `B` for rank 3).

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a log decay above 0 or NaN, or a beta that is not finite.

    Cost:
        `H * L * D * Dv` multiply-adds, a matrix product of numpy; a third of that of a call with outputs.

    References:
        W. Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid", 2025,
        arXiv:2502.07563.
    """
    keys = as_numpy(k, "k")
    channels = g is not None and np.ndim(as_numpy(g, "g", any_strides=True)) == keys.ndim
    x = checked(k, k, v, Common(1.0), g=g, channels=channels, beta=beta)
    if x.beta is not None and not np.isfinite(x.beta).all():
        raise ValueError("beta: got NaN or infinity, expected finite numbers")
    values = np.asarray(x.v, np.float32)
    logs = np.zeros((*values.shape[:-2], 1, 1))
    if x.g is not None:
        logs = np.asarray(x.g if channels else by_rows(x.g, x.v), np.float64)
    if not (logs <= 0).all():
        raise ValueError("g: got a number above 0 or NaN, expected logarithms of decays, at most 0")
    logs = logs.reshape(*values.shape[:-2], *logs.shape[-2:])
    # From each row to the stretch's end: its own decay is not part of it.
    after = np.cumsum(logs[..., ::-1, :], axis=-2)[..., ::-1, :]
    rest = np.concatenate([after[..., 1:, :], np.zeros_like(after[..., :1, :])], axis=-2)[..., : logs.shape[-2], :]
    wide = np.repeat(np.asarray(keys, np.float32), values.shape[-3] // keys.shape[-3], axis=-3)
    wide = wide * np.exp(rest).astype(np.float32)
    if x.beta is not None:
        wide = wide * np.asarray(by_rows(x.beta, x.v), np.float32).reshape(*values.shape[:-1], 1)
    total = after[..., 0, :] if after.shape[-2] else np.zeros((*after.shape[:-2], after.shape[-1]))
    return like(k, wide.swapaxes(-1, -2) @ values), total.astype(np.float32)


def exclusive_states(
    states: Sequence[Array], decays: Sequence[Array], *, initial_state: Array | None = None
) -> tuple[list[Array], Array]:
    """Exclusive scan: the state before each stretch of a sequence, from what `shard_state` gave of each.

    Args:
        states: what stretches add, in their order, floating, all `[..., D, Dv]`.
        decays: logarithms by which they decay what comes in, floating `[..., 1]` or `[..., D]`.
        initial_state: state before the first stretch, `[..., D, Dv]`; `None` is zeros.

    Returns:
        `(before, last)`: float32 states before each stretch, and the one after the last, in the kind of the first.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: no stretch, as many states as decays are not, or shapes that do not fit.

    Cost:
        A pass over the states.
    """
    states, decays = items_of(states, "states", "arrays"), items_of(decays, "decays", "arrays")
    if len(states) == 0 or len(states) != len(decays):
        raise ValueError(f"states: got {len(states)} beside {len(decays)} decays, expected at least one and as many")
    first = as_numpy(states[0], "states[0]")
    carried: NDArray[Any] = np.zeros(first.shape, np.float32)
    if initial_state is not None:
        given = as_numpy(initial_state, "initial_state")
        check_floating(given, "initial_state")
        if given.shape != first.shape:
            raise ValueError(f"initial_state: got shape {given.shape}, expected {first.shape}")
        carried = given.astype(np.float32)
    before = []
    for n, (state, decay) in enumerate(zip(states, decays, strict=True)):
        added, logs = as_numpy(state, f"states[{n}]"), as_numpy(decay, f"decays[{n}]")
        for x, name in ((added, f"states[{n}]"), (logs, f"decays[{n}]")):
            check_floating(x, name)
        if added.shape != first.shape:
            raise ValueError(f"states[{n}]: got shape {added.shape}, expected {first.shape}")
        if logs.shape not in (first.shape[:-1], (*first.shape[:-2], 1)):
            raise ValueError(f"decays[{n}]: got shape {logs.shape}, expected {first.shape[:-1]} or 1 at the end")
        before.append(like(states[0], carried))
        carried = np.exp(logs.astype(np.float32))[..., None] * carried + added.astype(np.float32)
    return before, like(states[0], carried)
