"""Calls of the engine of matrix states: what every recurrence checks and how its arrays reach the core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import FLOATS, Array, as_numpy, as_output, like
from longattn._checks import (
    batched,
    check_float_storage,
    check_floating,
    integer,
    real,
    result_array,
    sequence_bounds,
)
from longattn.linear.feature_map import FeatureMap, parts

#: Rows that are computed at once where nothing else is said: whole tiles of the matrix kernel of every instruction set.
CHUNK = 48
#: The most that the core computes at once; a larger `chunk_size` means this.
LARGEST_CHUNK = 252


@dataclass(frozen=True, slots=True)
class Inputs:
    """Checked arguments of a recurrence.

    Attributes:
        q: queries, of rank 3 or 4 as they came.
        k: keys, or `None`.
        v: values.
        g: log decays `[B, H, L, 1]` or `[B, H, L, D]`, or `None`.
        beta: factors of updates `[B, H, L, 1]`, or `None`.
        scale: factor of outputs.
        chunk: rows computed at once.
        bounds: bounds of packed sequences, or `None`.
        outputs: shape of the output.
        states: shape of the states.
    """

    q: NDArray[Any]
    k: NDArray[Any] | None
    v: NDArray[Any]
    g: NDArray[Any] | None
    beta: NDArray[Any] | None
    scale: float
    chunk: int
    bounds: NDArray[np.int64] | None
    outputs: tuple[int, ...]
    states: tuple[int, ...]


def checked(
    q: Array,
    k: Array | None,
    v: Array,
    *,
    names: tuple[str, str, str] = ("q", "k", "v"),
    g: Array | None = None,
    g_name: str = "g",
    channels: bool = False,
    columns: bool = False,
    beta: Array | None = None,
    beta_name: str = "beta",
    scale: object = None,
    extra: int = 0,
    chunk_size: object = CHUNK,
    cu_seqlens: Array | None = None,
) -> Inputs:
    """Arguments of `recurrence`, checked; `extra` is what states have in columns beyond those of values.

    With `columns`, `g` is `[B, H, L, Dv]`.
    """
    present(**{names[0]: q, names[2]: v})
    given = {name: None if x is None else as_numpy(x, name) for name, x in zip(names, (q, k, v), strict=True)}
    for name, x in given.items():
        if x is not None:
            check_float_storage(x, name)
    qn, kn, vn = given.values()
    assert qn is not None and vn is not None
    if qn.ndim not in (3, 4):
        raise ValueError(f"{names[0]}: got shape {qn.shape}, expected rank 3 or 4")
    length, heads, dim = qn.shape[-2], vn.shape[-3] if vn.ndim == qn.ndim else 0, qn.shape[-1]
    for name, x in given.items():
        if x is None:
            continue
        if x.ndim != qn.ndim:
            raise ValueError(f"{name}: got shape {x.shape}, expected rank {qn.ndim} as {names[0]}")
        if x.shape[:-3] != qn.shape[:-3]:
            raise ValueError(f"{name}: got batch {x.shape[0]}, expected {qn.shape[0]} as in {names[0]}")
        if x.shape[-2] != length:
            raise ValueError(f"{name}: got length {x.shape[-2]}, expected {length} as in {names[0]}")
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: got head_dim 0 in shape {x.shape}, expected at least 1")
    if kn is not None and kn.shape[-1] != dim:
        raise ValueError(f"{names[1]}: got head_dim {kn.shape[-1]}, expected {dim} as in {names[0]}")
    q_heads, k_heads = qn.shape[-3], heads if kn is None else kn.shape[-3]
    if k_heads == 0 or heads == 0 or heads % k_heads:
        raise ValueError(f"{names[2]}: got {heads} heads, expected a positive multiple of the {k_heads} of {names[1]}")
    if q_heads == 0 or q_heads % k_heads or (q_heads % heads and heads % q_heads):
        raise ValueError(
            f"{names[0]}: got {q_heads} heads, expected a multiple of the {k_heads} of {names[1]} that divides the "
            f"{heads} of {names[2]}, or a multiple of these"
        )
    batch = qn.shape[0] if qn.ndim == 4 else 1
    gates = (batch, heads, length)
    axes = (*gates, vn.shape[-1] if columns else dim) if channels or columns else None
    decays = None if g is None else _gate(g, g_name, gates, axes, qn.ndim)
    factors = None if beta is None else _gate(beta, beta_name, gates, None, qn.ndim)
    bounds = None
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens: got it with a batch of {batch}, expected one: sequences lie along its rows")
        bounds = sequence_bounds(cu_seqlens, "cu_seqlens", length)
    chunk = min(integer(chunk_size, "chunk_size", 1), LARGEST_CHUNK)
    factor = dim**-0.5 if scale is None else real(scale, "scale")
    if not abs(factor) <= float(np.finfo(np.float32).max):
        raise ValueError(f"scale: got {scale}, expected a finite float32")
    sequences = batch if bounds is None else len(bounds) - 1
    # Packed sequences each have a state, whatever the rank of their rows.
    front = qn.shape[:-3] if bounds is None else (sequences,)
    states = (*front, heads, dim, vn.shape[-1] + extra)
    outputs = (*qn.shape[:-3], max(q_heads, heads), length, vn.shape[-1])
    return Inputs(qn, kn, vn, decays, factors, factor, chunk, bounds, outputs, states)


def present(**arrays: Array | None) -> None:
    """Refuses `None` where it would stand for something that nobody asked for."""
    for name, x in arrays.items():
        if x is None:
            raise TypeError(f"{name}: got None, expected an array")


def check_unit_beta(beta: NDArray[Any] | None, name: str) -> None:
    """Refuses what a delta rule over keys of length 1 grows with: `I - beta k k^T` has the eigenvalue `1 - beta`."""
    if beta is None:
        return
    factors = beta.astype(np.float32, copy=False)
    if not ((factors >= 0) & (factors <= 2)).all():
        raise ValueError(
            f"{name}: got a number outside 0 to 2, or NaN, expected numbers from 0 to 2 with normalize_qk: beyond them "
            "states grow"
        )


def states_before(initial_state: Array | None, states: tuple[int, ...]) -> NDArray[np.float32] | None:
    """States before the first row, as float32."""
    if initial_state is None:
        return None
    first = as_numpy(initial_state, "initial_state")
    check_floating(first, "initial_state")
    if first.shape != states:
        raise ValueError(f"initial_state: got shape {first.shape}, expected {states}")
    return first if first.dtype == np.float32 else first.astype(np.float32)


def recurrence(
    q: Array,
    k: Array | None,
    v: Array,
    *,
    names: tuple[str, str, str] = ("q", "k", "v"),
    g: Array | None = None,
    g_name: str = "g",
    channels: bool = False,
    beta: Array | None = None,
    beta_name: str = "beta",
    delta: bool = False,
    scale: object = None,
    unit: float | None = None,
    normaliser: float | None = None,
    skip: NDArray[np.float32] | None = None,
    columns: bool | None = None,
    tied: bool = False,
    bonus: Array | None = None,
    pair: tuple[Array, Array] | None = None,
    squares: bool = False,
    maps: tuple[FeatureMap | None, FeatureMap | None] = (None, None),
    dtype: np.dtype[Any] | None = None,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: object = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """`S_t = A_t S_(t-1) + k_t u_t^T`, `o_t = scale * q_t^T S_t`, with everything checked.

    Args:
        q: queries `[B, Hq, L, D]` or `[Hq, L, D]`.
        k: keys `[B, Hk, L, D]`; `None` with `tied`.
        v: values `[B, H, L, Dv]`; states belong to these heads.
        names: what the caller calls these three.
        g: log decays: `[H]`, `[B, H, L]` or, with `channels`, `[B, H, L, D]`.
        g_name: what the caller calls them.
        channels: whether each channel of the keys decays by itself.
        beta: factors of updates `[B, H, L]`.
        beta_name: what the caller calls them.
        delta: whether an update is what the state does not hold yet.
        scale: factor of outputs; `None` is `D ** -0.5`.
        unit: rows of `q` and `k` are divided by the root of their sum of squares and this.
        normaliser: outputs are divided by the same of a value of 1, plus this.
        skip: float32 `[H]`, factors of values that are added to outputs.
        columns: `g` is `[B, H, L, Dv]`, decays of the columns of states; True: values are multiplied by `1 - e^g`.
        tied: keys are `1 - e^g`.
        bonus: floating `[H, D]`, called "u": queries read the state before their row and the row's key times this.
        pair: `a` and `b` like `k`: `b_t (a_t^T S_(t-1))` is added to states.
        squares: scores of rows of a chunk with each other are `max(s, 0) ** 2`.
        maps: what makes features of queries and of keys, which `D` then counts.
        dtype: of the output; `None` is that of `q`.
        initial_state: `[N, H, D, Dv]`, with a normaliser `[N, H, D, Dv + 1]`.
        out_state: float32 array for the final states; may be `initial_state`.
        chunk_size: rows computed at once.
        cu_seqlens: bounds of `N` sequences along the rows of a batch of 1; `None`: `N` is `B`.
        out: array for the output.

    Returns:
        `(output, states)` in the kind of `q`.
    """
    if not tied:
        present(**{names[1]: k})
    x = checked(
        q,
        k,
        v,
        names=names,
        g=g,
        g_name=g_name,
        channels=channels,
        columns=columns is not None,
        beta=beta,
        beta_name=beta_name,
        scale=scale,
        extra=int(normaliser is not None),
        chunk_size=chunk_size,
        cu_seqlens=cu_seqlens,
    )
    if delta and unit is not None:
        check_unit_beta(x.beta, beta_name)
    q_heads, k_heads, heads = x.q.shape[-3], x.k.shape[-3] if x.k is not None else x.v.shape[-3], x.v.shape[-3]
    dim, states = x.q.shape[-1], x.states
    boost, second = None, None
    if bonus is not None:
        boost = as_numpy(bonus, "u", any_strides=True)
        check_floating(boost, "u")
        if boost.shape != (heads, dim):
            raise ValueError(f"u: got shape {boost.shape}, expected {(heads, dim)}")
        boost = np.ascontiguousarray(boost, np.float32).ravel()
        if not np.isfinite(boost).all():
            raise ValueError("u: got numbers that are not finite, expected finite ones")
    if pair is not None:
        assert x.k is not None
        second = [_like_keys(y, name, x.k) for y, name in zip(pair, ("a", "b"), strict=True)]
    sides = zip(maps, (q_heads, k_heads), (False, True), strict=True)
    made = [None if phi is None else parts(phi, n, dim, keys=keys) for phi, n, keys in sides]
    if maps[0] is not None:
        states = (*states[:-2], maps[0].features(dim), states[-1])

    inputs = {**dict(zip(names, (x.q, x.k, x.v), strict=True)), g_name: x.g, beta_name: x.beta}
    result = result_array(out, q, x.outputs, x.q.dtype if dtype is None else dtype, inputs)
    first = states_before(initial_state, states)
    if out_state is None:
        last = np.empty(states, np.float32)
    else:
        last = as_output(
            out_state,
            like=q,
            shape=states,
            dtype=np.dtype(np.float32),
            inputs={**inputs, "out": result},
            name="out_state",
        )
        if first is not None and np.may_share_memory(first, last):
            if _begins(first) != _begins(last) or first.strides != last.strides:
                raise ValueError("out_state: got an array that overlaps initial_state, expected the same or another")
            first = last
    last4 = batched(last, 4)
    _core.recurrence(
        batched(x.q, 4),
        None if x.k is None else batched(x.k, 4),
        batched(x.v, 4),
        x.g,
        x.beta,
        delta,
        x.scale,
        unit,
        normaliser,
        skip,
        None if first is None else last4 if first is last else batched(first, 4),
        x.bounds,
        x.chunk,
        batched(result, 4),
        last4,
        columns=columns,
        bonus=boost,
        pair=second,
        squares=squares,
        maps=(made[0], made[1]),
    )
    return like(q, result) if out is None else out, like(q, last) if out_state is None else out_state


def _like_keys(x: Array, name: str, keys: NDArray[Any]) -> NDArray[Any]:
    """Rows that come in the shape of keys."""
    rows = as_numpy(x, name)
    check_float_storage(rows, name)
    if rows.shape != keys.shape:
        raise ValueError(f"{name}: got shape {rows.shape}, expected {keys.shape} as k")
    return batched(rows, 4)


def _gate(x: Array, name: str, rows: tuple[int, int, int], channels: tuple[int, ...] | None, rank: int) -> NDArray[Any]:
    """A gate as `[B, H, L, 1]`, or `[B, H, L, D]`, in a storage dtype."""
    gate = as_numpy(x, name, any_strides=channels is None)
    check_floating(gate, name)
    if gate.dtype not in FLOATS:
        gate = gate.astype(np.float32)
    if channels is not None:
        expected = channels[4 - rank :]
        if gate.shape != expected:
            raise ValueError(f"{name}: got shape {gate.shape}, expected {expected}")
        return batched(gate, 4)
    expected = rows[4 - rank :]
    if gate.shape == (rows[1],) and expected != (rows[1],):
        return np.broadcast_to(gate[:, None, None], (*rows, 1))
    if gate.shape != expected:
        raise ValueError(f"{name}: got shape {gate.shape}, expected {expected}")
    return gate.reshape(*rows, 1)


def _begins(x: NDArray[Any]) -> int:
    """Address of the first number."""
    address: int = x.__array_interface__["data"][0]
    return address
