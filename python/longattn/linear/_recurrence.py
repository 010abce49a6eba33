"""Calls of the engine of matrix states: what every recurrence checks and how its arrays reach the core."""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import FLOAT64, FLOATS, Array, as_numpy, as_output, like
from longattn._checks import (
    all_within,
    batched,
    check_float_storage,
    check_floating,
    integer,
    result_array,
    scale_factor,
    sequence_bounds,
)
from longattn.linear.feature_map import FeatureMap, parts

#: Rows that are computed at once where nothing else is said: whole tiles of the matrix kernel of every instruction set.
CHUNK = 48
#: The most that the core computes at once; a larger `chunk_size` means this.
LARGEST_CHUNK = 252
FLOAT32: np.dtype[Any] = np.dtype(np.float32)


class _Tied(Enum):
    """Its one member is what may stand in the place of keys."""

    TIED = "1 - e^g"


#: In the place of keys: they are what the decays per channel take away, `1 - e^g`.
TIED: Final = _Tied.TIED


class Common(NamedTuple):
    """What all recurrences take beside rows and gates; `ENTRIES` of `_documented` says what they are."""

    scale: object = None
    initial_state: Array | None = None
    out_state: Array | None = None
    chunk_size: object = CHUNK
    cu_seqlens: Array | None = None
    out: Array | None = None


class Inputs(NamedTuple):
    """Checked arguments of a recurrence.

    Attributes:
        q: queries, of rank 3 or 4 as they came.
        k: keys; `None` where they are tied to decays.
        v: values.
        g: log decays `[H]`, `[B, H, L]` or, as many axes as values have, `[B, H, L, D]`; or `None`.
        beta: factors of updates `[B, H, L]` or `[H]`, or `None`.
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
    k: Array | Literal[_Tied.TIED],
    v: Array,
    common: Common,
    *,
    names: tuple[str, str, str] = ("q", "k", "v"),
    g: Array | None = None,
    g_name: str = "g",
    channels: bool = False,
    columns: bool = False,
    beta: Array | None = None,
    beta_name: str = "beta",
    extra: int = 0,
    double: bool = False,
) -> Inputs:
    """Arguments of `recurrence`, checked; `extra` is what states have in columns beyond those of values.

    With `columns`, `g` is `[B, H, L, Dv]`; with `double`, all of `q`, `k` and `v` may be float64.
    """
    q_name, k_name, v_name = names
    if q is None or k is None or v is None:
        present(**{q_name: q, k_name: k, v_name: v})
    qn, vn = as_numpy(q, q_name), as_numpy(v, v_name)
    kn = None if k is TIED else as_numpy(k, k_name)
    wide = double and qn.dtype == FLOAT64
    if not _alike(qn, kn, vn, wide):
        _check_rows(qn, kn, vn, names, wide, double)
    *front, q_heads, length, dim = qn.shape
    heads, _, value_dim = vn.shape[-3:]
    gates, decays, factors = (*front, heads, length), None, None
    if g is not None:
        by_row = not (channels or columns)
        decays = _gate(g, g_name, gates if by_row else (*gates, value_dim if columns else dim), by_row, wide)
    if beta is not None:
        factors = _gate(beta, beta_name, gates, True, wide)
    outputs = (*front, max(q_heads, heads), length, value_dim)
    batch, bounds = front[0] if front else 1, None
    if common.cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens: got it with a batch of {batch}, expected one: sequences lie along its rows")
        bounds = sequence_bounds(common.cu_seqlens, "cu_seqlens", length)
        # Packed sequences each have a state, whatever the rank of their rows.
        front = [len(bounds) - 1]
    chunk = min(integer(common.chunk_size, "chunk_size", 1), LARGEST_CHUNK)
    states = (*front, heads, dim, value_dim + extra)
    return Inputs(qn, kn, vn, decays, factors, scale_factor(common.scale, dim), chunk, bounds, outputs, states)


def _alike(q: NDArray[Any], k: NDArray[Any] | None, v: NDArray[Any], wide: bool) -> bool:
    """Whether rows of a dtype and of as many heads came, as nearly always: `_check_rows` has nothing to say of them."""
    shape, width, dtype = q.shape, v.shape[-1:], q.dtype
    return (
        len(shape) in (3, 4)
        and v.shape == shape[:-1] + width
        and (k is None or (k.shape == shape and k.dtype is dtype))
        and v.dtype is dtype
        and (wide or dtype in FLOATS)
        and 0 not in (shape[-3], shape[-1], *width)
    )


def _check_rows(
    qn: NDArray[Any],
    kn: NDArray[Any] | None,
    vn: NDArray[Any],
    names: tuple[str, str, str],
    wide: bool,
    double: bool,
) -> None:
    """Says what does not fit of queries, keys and values."""
    q_name, k_name, v_name = names
    rows = ((qn, q_name), (vn, v_name)) if kn is None else ((qn, q_name), (kn, k_name), (vn, v_name))
    front, length, dim = qn.shape[:-3], qn.shape[-2] if qn.ndim > 1 else 0, qn.shape[-1] if qn.ndim else 0
    for x, name in rows:
        if wide:
            if x.dtype != FLOAT64:
                raise TypeError(f"{name}: got dtype {x.dtype}, expected float64 as {q_name}")
        else:
            check_float_storage(x, name, double)
    if qn.ndim not in (3, 4):
        raise ValueError(f"{q_name}: got shape {qn.shape}, expected rank 3 or 4")
    for x, name in rows:
        shape = x.shape
        if len(shape) != qn.ndim:
            raise ValueError(f"{name}: got shape {shape}, expected rank {qn.ndim} as {q_name}")
        if shape[:-3] != front:
            raise ValueError(f"{name}: got batch {shape[0]}, expected {qn.shape[0]} as in {q_name}")
        if shape[-2] != length:
            raise ValueError(f"{name}: got length {shape[-2]}, expected {length} as in {q_name}")
        if shape[-1] == 0:
            raise ValueError(f"{name}: got head_dim 0 in shape {shape}, expected at least 1")
    if kn is not None and kn.shape[-1] != dim:
        raise ValueError(f"{k_name}: got head_dim {kn.shape[-1]}, expected {dim} as in {q_name}")
    heads, q_heads = vn.shape[-3], qn.shape[-3]
    k_heads = heads if kn is None else kn.shape[-3]
    if k_heads == 0 or heads == 0 or heads % k_heads:
        raise ValueError(f"{v_name}: got {heads} heads, expected a positive multiple of the {k_heads} of {k_name}")
    if q_heads == 0 or q_heads % k_heads or (q_heads % heads and heads % q_heads):
        raise ValueError(
            f"{q_name}: got {q_heads} heads, expected a multiple of the {k_heads} of {k_name} that divides the "
            f"{heads} of {v_name}, or a multiple of these"
        )


def present(**arrays: Array | Literal[_Tied.TIED] | None) -> None:
    """Refuses `None` where it would stand for something that nobody asked for."""
    for name, x in arrays.items():
        if x is None:
            raise TypeError(f"{name}: got None, expected an array")


def check_unit_beta(beta: NDArray[Any] | None, name: str) -> None:
    """Refuses what a delta rule over keys of length 1 grows with: `I - beta k k^T` has the eigenvalue `1 - beta`."""
    if beta is None:
        return
    if not all_within(beta.astype(np.float32, copy=False), 0, 2):
        raise ValueError(
            f"{name}: got a number outside 0 to 2, or NaN, expected numbers from 0 to 2 with normalize_qk: beyond them "
            "states grow"
        )


def states_before(
    initial_state: Array | None, states: tuple[int, ...], dtype: np.dtype[Any] = FLOAT32
) -> NDArray[Any] | None:
    """States before the first row, in the dtype of arithmetic."""
    if initial_state is None:
        return None
    first = as_numpy(initial_state, "initial_state")
    check_floating(first, "initial_state")
    if first.shape != states:
        raise ValueError(f"initial_state: got shape {first.shape}, expected {states}")
    return first if first.dtype == dtype else first.astype(dtype)


def recurrence(
    q: Array,
    k: Array | Literal[_Tied.TIED],
    v: Array,
    common: Common,
    *,
    names: tuple[str, str, str] = ("q", "k", "v"),
    g: Array | None = None,
    g_name: str = "g",
    channels: bool = False,
    beta: Array | None = None,
    beta_name: str = "beta",
    delta: bool = False,
    unit: float | None = None,
    normaliser: float | None = None,
    skip: NDArray[np.float32] | None = None,
    columns: bool | None = None,
    bonus: Array | None = None,
    pair: tuple[Array, Array] | None = None,
    squares: bool = False,
    maps: tuple[FeatureMap | dict[str, Any] | None, FeatureMap | dict[str, Any] | None] = (None, None),
    dtype: np.dtype[Any] | None = None,
) -> tuple[Array, Array]:
    """`S_t = A_t S_(t-1) + k_t u_t^T`, `o_t = scale * q_t^T S_t`, with everything checked.

    Args:
        q: queries `[B, Hq, L, D]` or `[Hq, L, D]`.
        k: keys `[B, Hk, L, D]`, or `TIED`.
        v: values `[B, H, L, Dv]`; states belong to these heads.
        common: what all recurrences take: `initial_state` is `[N, H, D, Dv]`, with a normaliser `[N, H, D, Dv + 1]`.
        names: what the caller calls `q`, `k` and `v`.
        g: log decays: `[H]`, `[B, H, L]` or, with `channels`, `[B, H, L, D]`.
        g_name: what the caller calls them.
        channels: whether each channel of the keys decays by itself.
        beta: factors of updates `[B, H, L]`.
        beta_name: what the caller calls them.
        delta: whether an update is what the state does not hold yet.
        unit: rows of `q` and `k` are divided by the root of their sum of squares and this.
        normaliser: outputs are divided by the same of a value of 1, plus this.
        skip: float32 `[H]`, factors of values that are added to outputs.
        columns: `g` is `[B, H, L, Dv]`, decays of the columns of states; True: values are multiplied by `1 - e^g`.
        bonus: floating `[H, D]`, called "u": queries read the state before their row and the row's key times this.
        pair: `a` and `b` like `k`: `b_t (a_t^T S_(t-1))` is added to states.
        squares: scores of rows of a chunk with each other are `max(s, 0) ** 2`.
        maps: what makes features of queries and of keys, which `D` then counts; a dict as the compiled module takes it.
        dtype: of the output; `None` is that of `q`.

    Returns:
        `(output, states)` in the kind of `q`.

    float64 `q`, `k` and `v`, without maps and squares, are computed in float64, row by row, and states are float64.
    """
    plain = not squares and maps[0] is None and maps[1] is None
    x = checked(
        q,
        k,
        v,
        common,
        names=names,
        g=g,
        g_name=g_name,
        channels=channels,
        columns=columns is not None,
        beta=beta,
        beta_name=beta_name,
        extra=int(normaliser is not None),
        double=plain,
    )
    if delta and unit is not None:
        check_unit_beta(x.beta, beta_name)
    states, is_double = x.states, x.q.dtype == FLOAT64
    arithmetic = FLOAT64 if is_double else FLOAT32
    boost = None if bonus is None else _bonus(bonus, (x.v.shape[-3], x.q.shape[-1]), arithmetic)
    second = None
    if pair is not None:
        assert x.k is not None
        second = (like_keys(pair[0], "a", x.k), like_keys(pair[1], "b", x.k))
    made: Any = (None, None)
    if not plain:
        sides = zip(maps, (x.q, x.v if x.k is None else x.k), (False, True), strict=True)
        made = tuple(
            parts(phi, y.shape[-3], y.shape[-1], keys=n) if isinstance(phi, FeatureMap) else phi for phi, y, n in sides
        )
        if isinstance(maps[0], FeatureMap):
            states = (*states[:-2], maps[0].features(x.q.shape[-1]), states[-1])

    # That results have memory of their own the core sees, faster than numpy.
    inputs = {} if not is_double else dict(zip((*names, g_name, beta_name), x[:5], strict=True))
    kind = x.q.dtype if dtype is None or is_double else dtype
    result = result_array(common.out, q, x.outputs, kind, inputs)
    first = states_before(common.initial_state, states, arithmetic)
    if common.out_state is None:
        last = np.empty(states, arithmetic)
    else:
        last = as_output(common.out_state, like=q, shape=states, dtype=arithmetic, inputs=inputs, name="out_state")
        if first is not None and common.out_state is common.initial_state:
            first = last
        elif first is not None and np.may_share_memory(first, last):
            if _begins(first) != _begins(last) or first.strides != last.strides:
                raise ValueError("out_state: got an array that overlaps initial_state, expected the same or another")
            first = last
    if is_double:
        _double(x, first, result, last, delta=delta, rule=(unit, normaliser, skip), own=(columns, boost, second))
    else:
        _core.recurrence(
            x.q,
            x.k,
            x.v,
            x.g,
            x.beta,
            delta,
            x.scale,
            unit,
            normaliser,
            skip,
            first,
            x.bounds,
            x.chunk,
            result,
            last,
            columns=columns,
            bonus=boost,
            pair=second,
            squares=squares,
            maps=made,
            names=None if names == ("q", "k", "v") and g_name == "g" else (*names, g_name, beta_name),
        )
    out, out_state = common.out, common.out_state
    return like(q, result) if out is None else out, like(q, last) if out_state is None else out_state


def _double(
    x: Inputs,
    first: NDArray[Any] | None,
    result: NDArray[Any],
    last: NDArray[Any],
    *,
    delta: bool,
    rule: tuple[float | None, float | None, NDArray[np.float32] | None],
    own: tuple[bool | None, NDArray[Any] | None, tuple[NDArray[Any], NDArray[Any]] | None],
) -> None:
    """The recurrence of float64 arrays, in contiguous copies of results where these are not."""
    (unit, normaliser, skip), (columns, boost, pair) = rule, own
    out, state = (np.ascontiguousarray(batched(y, 4)) for y in (result, last))
    if first is not last:
        state[...] = 0 if first is None else first
    g, by_row = x.g, x.g is not None and x.g.ndim < x.v.ndim
    if g is not None:
        g = by_rows(g, x.v) if by_row else batched(g, 4)
    _core.recurrence_double(
        batched(x.q, 4),
        None if x.k is None else batched(x.k, 4),
        batched(x.v, 4),
        g,
        by_row,
        None if x.beta is None else by_rows(x.beta, x.v),
        delta,
        x.scale,
        unit,
        normaliser,
        None if skip is None else skip.astype(np.float64),
        x.bounds,
        out,
        state,
        columns=columns,
        bonus=boost,
        pair=None if pair is None else (batched(pair[0], 4), batched(pair[1], 4)),
    )
    for made, to in ((out, result), (state, last)):
        if not np.may_share_memory(made, to):
            to[...] = made.reshape(to.shape)


def by_rows(gate: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """A gate of the rows, or of the heads, of values, as `[B, H, L, 1]`."""
    return np.broadcast_to(gate[:, None] if gate.ndim == 1 else gate, (1, *v.shape[:-1])[-3:])[..., None]


def _bonus(bonus: Array, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    boost = as_numpy(bonus, "u", any_strides=True)
    check_floating(boost, "u")
    if boost.shape != shape:
        raise ValueError(f"u: got shape {boost.shape}, expected {shape}")
    if not np.isfinite(boost).all():
        raise ValueError("u: got numbers that are not finite, expected finite ones")
    return np.ascontiguousarray(boost, dtype).ravel()


def like_keys(x: Array, name: str, keys: NDArray[Any]) -> NDArray[Any]:
    """Rows that come in the shape of keys."""
    rows = as_numpy(x, name)
    if keys.dtype == FLOAT64 != rows.dtype:
        raise TypeError(f"{name}: got dtype {rows.dtype}, expected float64 as k")
    if keys.dtype != FLOAT64:
        check_float_storage(rows, name)
    if rows.shape != keys.shape:
        raise ValueError(f"{name}: got shape {rows.shape}, expected {keys.shape} as k")
    return rows


def _gate(x: Array, name: str, expected: tuple[int, ...], by_row: bool, wide: bool) -> NDArray[Any]:
    """A gate in its shape, in a storage dtype or, where it is `wide`, float64; gates of rows may be of heads alone."""
    gate = as_numpy(x, name, any_strides=by_row)
    if wide or gate.dtype not in FLOATS:
        check_floating(gate, name)
        gate = gate.astype(FLOAT64 if wide else FLOAT32, copy=False)
    if gate.shape != expected and not (by_row and gate.shape == (expected[-2],)):
        raise ValueError(f"{name}: got shape {gate.shape}, expected {expected}")
    return gate


def _begins(x: NDArray[Any]) -> int:
    """Address of the first number."""
    address: int = x.__array_interface__["data"][0]
    return address
