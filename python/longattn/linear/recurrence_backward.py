"""Gradients of the recurrences of matrix states, from what a forward call was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import batched, check_float_storage, check_floating, finite, flag, shape_of
from longattn.linear._recurrence import CHUNK, Common, by_rows, check_unit_beta, checked, like_keys, states_before


@dataclass(frozen=True, slots=True)
class RecurrenceGradients:
    """Gradients by the arguments of a recurrence, in their shapes.

    Attributes:
        dq: by queries.
        dk: by keys.
        dv: by values.
        dg: by log decays; `None` where there are none.
        d_beta: by factors of updates; `None` where there are none.
        d_initial_state: by the states before the first row, float32.
        d_pair: by `a` and by `b`; `None` where there are none.
    """

    dq: Array
    dk: Array
    dv: Array
    dg: Array | None
    d_beta: Array | None
    d_initial_state: Array
    d_pair: tuple[Array, Array] | None = None


def recurrence_backward(
    d_out: Array,
    d_state: Array | None,
    q: Array,
    k: Array,
    v: Array,
    *,
    g: Array | None = None,
    beta: Array | None = None,
    delta: bool = False,
    scale: float | None = None,
    normalize_qk: bool = False,
    normalize: bool = False,
    eps: float = 1e-6,
    out: Array | None = None,
    pair: tuple[Array, Array] | None = None,
    initial_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
) -> RecurrenceGradients:
    """Gradients of `S_t = A_t S_(t-1) + beta_t k_t u_t^T`, `o_t = scale * q_t^T S_t`, by everything that goes in.

    `A_t` is `Diag(e^g_t)`, `u_t` is `v_t` or, with `delta`, `v_t - (A_t S_(t-1))^T k_t`. So these are the gradients of

        linear_attention                   scale 1, `normalize`
        lightning_attention, retention     g per row, the same in all rows: that of the slope is minus the sum of `dg`
        gated_linear_attention             g per channel
        delta_rule_attention               beta, `delta`
        gated_delta_rule                   g per row, beta, `delta`
        kimi_delta_attention               g per channel, beta, `delta`, `normalize_qk`
        rwkv7                              g per channel, `pair`, scale 1
        hgrn2                              g per channel, keys `1 - e^g`, whose gradient adds to that of g

    Sequences are walked from their last chunk to their first; states at the starts of chunks are made anew. Decays of
    0 (`g = -inf`) have a gradient of 0. `longattn.torch` makes this part of torch's autograd.

    Args:
        d_out: gradient of the output, its shape; float32, float16 or bfloat16.
        d_state: gradient of the final states, floating, in their shape; `None` is zero.
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`, as in the forward call.
        k: keys `[B, Hk, L, D]`.
        v: values `[B, H, L, Dv]`.
        g: log decays, floating `[B, H, L]` or `[B, H, L, D]`; `None` is no decay. One per head, `[H]`, has a gradient
            per row.
        beta: factors of updates, floating `[B, H, L]`; `None` is 1. Below 1e-10 in magnitude it counts as that with
            `delta`, which float32 cannot tell from 0. With `delta` and `normalize_qk`, from 0 to 2.
        delta: whether an update is what the state does not hold yet.
        scale: factor of outputs; `None` is `D ** -0.5`.
        normalize_qk: rows of `q` and `k` were divided by `sqrt(sum of squares + 1e-6)`.
        normalize: outputs were divided by the sum of their weights plus `eps`; not with `delta`.
        eps: added to that divisor.
        out: with `normalize`, the output of the forward call.
        pair: `(a, b)` in the shape of `k`: `b_t (a_t^T S_(t-1))` was added to states. With log decays per channel, and
            neither `delta` nor `normalize`.
        initial_state: states before the first row, as in the forward call.
        chunk_size: rows computed at once, at most 252 (more means 252); it changes rounding only.
        cu_seqlens: bounds of packed sequences, as in the forward call.

    Returns:
        `RecurrenceGradients` in the kind of `q`; each in the dtype of its argument, but float32 for the states and
        for gates of a dtype other than float16 and bfloat16. Arithmetic is float32, the same bits for any number of
        threads. Numbers that are not finite may spoil the gradients of a whole sequence.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or gates that do not fit, or `normalize` without `out`.

    Cost:
        Three to four times the forward call, most with decays per channel. Memory beyond the gradients, which are made
        in float32: per thread the states at the starts of a sequence's chunks, at most 32 MiB or, where that is not
        enough, twice the root of their number.
    """
    delta, unit, divided = flag(delta, "delta"), flag(normalize_qk, "normalize_qk"), flag(normalize, "normalize")
    if divided and delta:
        raise ValueError("normalize: got True with the delta rule, expected one of them")
    rank = len(shape_of(q, "q"))
    channels = g is not None and len(shape_of(g, "g")) == rank
    x = checked(
        q,
        k,
        v,
        Common(scale, chunk_size=chunk_size, cu_seqlens=cu_seqlens),
        g=g,
        channels=channels,
        beta=beta,
        extra=int(divided),
    )
    x = x._replace(
        g=None if x.g is None else batched(x.g, 4) if channels else by_rows(x.g, x.v),
        beta=None if x.beta is None else by_rows(x.beta, x.v),
    )
    assert x.k is not None
    keys = None
    if pair is not None:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"pair: got {type(pair).__name__}, expected (a, b)")
        if not channels or delta or divided:
            raise ValueError("pair: got one with another rule, expected log decays per channel and nothing else")
        keys = tuple(batched(like_keys(y, name, x.k), 4) for y, name in zip(pair, ("a", "b"), strict=True))
    if delta and unit:
        check_unit_beta(x.beta, "beta")
    given = _outputs(d_out, "d_out", x.outputs)
    results = None
    if divided:
        if out is None:
            raise ValueError("out: got None, expected the output of the forward call, for normalize")
        results = _outputs(out, "out", x.outputs)
    after = None
    if d_state is not None:
        after = as_numpy(d_state, "d_state")
        check_floating(after, "d_state")
        if after.shape != x.states:
            raise ValueError(f"d_state: got shape {after.shape}, expected {x.states}")
        after = after.astype(np.float32, copy=False)
    first = states_before(initial_state, x.states)
    dq, dk, dv = (np.empty(a.shape, np.float32) for a in (x.q, x.k, x.v))
    dg, d_beta = (None if a is None else np.empty(a.shape, np.float32) for a in (x.g, x.beta))
    d_first = np.empty(x.states, np.float32)
    d_keys = None if keys is None else tuple(np.empty(y.shape, np.float32) for y in keys)
    _core.recurrence_backward(
        batched(x.q, 4),
        batched(x.k, 4),
        batched(x.v, 4),
        x.g,
        x.beta,
        delta,
        x.scale,
        1e-6 if unit else None,
        finite(eps, "eps", 0) if divided else None,
        None if first is None else batched(first, 4),
        x.bounds,
        x.chunk,
        batched(given, 4),
        None if after is None else batched(after, 4),
        None if results is None else batched(results, 4),
        batched(dq, 4),
        batched(dk, 4),
        batched(dv, 4),
        dg,
        d_beta,
        batched(d_first, 4),
        pair=keys,
        d_pair=d_keys,
    )
    found = [like(q, d.astype(a.dtype, copy=False)) for d, a in ((dq, x.q), (dk, x.k), (dv, x.v))]
    decays = _gate_gradient(q, dg, x.g, rank, channels)
    factors = _gate_gradient(q, d_beta, x.beta, rank, False)
    of_pair: Any = None
    if keys is not None and d_keys is not None:
        of_pair = tuple(
            like(q, d.astype(y.dtype, copy=False).reshape(x.k.shape)) for d, y in zip(d_keys, keys, strict=True)
        )
    return RecurrenceGradients(found[0], found[1], found[2], decays, factors, like(q, d_first), of_pair)


def _outputs(x: Array, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    found = as_numpy(x, name)
    check_float_storage(found, name)
    if found.shape != shape:
        raise ValueError(f"{name}: got shape {found.shape}, expected {shape}")
    return found


def _gate_gradient(
    q: Array, d: NDArray[np.float32] | None, gate: NDArray[Any] | None, rank: int, channels: bool
) -> Array | None:
    """In the rank that the gate came in: one per row has an axis of 1 here."""
    if d is None or gate is None:
        return None
    plain = (d[0] if rank == 3 else d) if channels else (d[0, ..., 0] if rank == 3 else d[..., 0])
    return like(q, plain.astype(gate.dtype, copy=False))
