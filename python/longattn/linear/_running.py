"""Sums over the rows so far, read by each row: what causal forms of the methods over all keys share.

The papers define these methods over all keys. In the causal form row `t` counts keys and values up to `t`, by the same
formula, and a state of fixed size goes on from call to call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import batched, check_float_storage, check_floating, finite, result_array, returned
from longattn.linear._local import add_causal_convolution
from longattn.linear._recurrence import Common, recurrence
from longattn.linear.feature_map import FeatureMap

Float32 = NDArray[np.float32]

#: The map of methods whose features are `max(x, 0)`.
RELU = FeatureMap(kind="relu")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunningStatistics:
    """Sums over the rows so far, float32.

    Attributes:
        states: `[B, H, F, Dv + 1]`: `S = sum phi(k_j) v_j^T` and, as the last column, `z = sum phi(k_j)`.
        values: `[B, H, Dv]`: `u = sum v_j`.
        count: how many rows.
    """

    states: Float32
    values: Float32
    count: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LocalState:
    """Sums over the rows so far, and the last values that a convolution sees, float32.

    Attributes:
        states: `[B, H, D, Dv + 1]`: `S` and, as the last column, `z`.
        before: `[B, H, K - 1, Dv]`.
    """

    states: Float32
    before: Float32


def attend(
    q: Array,
    k: Array,
    v: Array,
    phi: FeatureMap | None,
    read_out: tuple[str, float, float],
    initial_state: object,
    chunk_size: object,
    out: Array | None,
    factors: Float32 | None = None,
) -> tuple[Array, RunningStatistics]:
    """A read-out of sums over the rows so far."""
    qn, kn, vn = rows = rows_of(q, k, v)
    batch, heads, length, value_dim = vn.shape
    features = qn.shape[3] if phi is None else phi.features(qn.shape[3])
    states, sums, count = None, np.zeros((batch, heads, value_dim), np.float32), 0
    if initial_state is not None:
        check_state(initial_state, RunningStatistics, states=(batch, heads, features, value_dim + 1), values=sums.shape)
        assert isinstance(initial_state, RunningStatistics)
        states, sums, count = initial_state.states, initial_state.values.copy(), initial_state.count
    result = result_of(q, rows, out)
    # Values of 1 beside the values have the sums of weights.
    wide = np.concatenate([vn, np.ones((*vn.shape[:3], 1), vn.dtype)], axis=3)
    maps = (phi, phi) if phi is not None and phi.kind != "identity" else (None, None)
    common = Common(1.0, states, None, chunk_size)
    read, after = recurrence(qn, kn, wide, common, maps=maps, dtype=np.dtype(np.float32))
    _core.running_read(np.asarray(read), vn, sums, count, read_out, factors, batched(result, 4))
    last = RunningStatistics(states=np.asarray(after, np.float32), values=sums, count=count + length)
    return returned(out, q, result, None), last


def divide(
    q: Array,
    rows: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    maps: Any,
    eps: object,
    weight: Array | None,
    initial_state: object,
    chunk_size: object,
    out: Array | None,
) -> tuple[Array, LocalState]:
    """Weights divided by their sum, and a convolution of the values."""
    qn, kn, vn = rows
    batch, heads, _, value_dim = vn.shape
    taps: Float32 = np.zeros((value_dim, 1), np.float32)
    if weight is not None:
        given = as_numpy(weight, "weight", any_strides=True)
        check_floating(given, "weight")
        if given.ndim != 2 or given.shape[0] != value_dim or given.shape[1] == 0:
            raise ValueError(f"weight: got shape {given.shape}, expected ({value_dim}, taps)")
        taps = given.astype(np.float32)
    states, before = None, np.zeros((batch, heads, taps.shape[1] - 1, value_dim), np.float32)
    if initial_state is not None:
        check_state(initial_state, LocalState, states=(batch, heads, qn.shape[3], value_dim + 1), before=before.shape)
        assert isinstance(initial_state, LocalState)
        states, before = initial_state.states, initial_state.before
    result = result_of(q, rows, out)
    local = weight is not None
    to = None if local else batched(result, 4)
    common = Common(1.0, states, None, chunk_size, None, to)
    dtype = np.dtype(np.float32) if local else None
    made, after = recurrence(qn, kn, vn, common, maps=maps, normaliser=finite(eps, "eps", 0), dtype=dtype)
    if local:
        sums = np.asarray(made, np.float32)
        before = add_causal_convolution(sums, vn, np.broadcast_to(taps, (heads, *taps.shape)), before)
        batched(result, 4)[...] = sums
    return returned(out, q, result, None), LocalState(states=np.asarray(after, np.float32), before=before)


def rows_of(q: Array, k: Array, v: Array) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Queries, keys and values of rank 4 that fit each other, row by row."""
    qn, kn, vn = found = as_numpy(q, "q"), as_numpy(k, "k"), as_numpy(v, "v")
    for x, name in zip(found, "qkv", strict=True):
        check_float_storage(x, name)
        if x.ndim not in (3, 4) or x.ndim != qn.ndim:
            raise ValueError(f"{name}: got shape {x.shape}, expected rank {qn.ndim if qn.ndim in (3, 4) else '3 or 4'}")
    if kn.shape != (*vn.shape[:-1], qn.shape[-1]) or 0 in (kn.shape[-1], vn.shape[-1], vn.shape[-3]):
        raise ValueError(f"k: got shape {kn.shape}, expected {(*vn.shape[:-1], qn.shape[-1])} as v and q, none empty")
    if qn.shape[:-3] != vn.shape[:-3] or qn.shape[-2] != vn.shape[-2] or qn.shape[-3] % vn.shape[-3]:
        raise ValueError(f"q: got shape {qn.shape}, expected the rows of v, {vn.shape}, and a multiple of its heads")
    return batched(qn, 4), batched(kn, 4), batched(vn, 4)


def result_of(q: Array, rows: tuple[NDArray[Any], NDArray[Any], NDArray[Any]], out: Array | None) -> NDArray[Any]:
    qn, kn, vn = rows
    shape = (*qn.shape[:3], vn.shape[3])[4 - len(q.shape) :]
    return result_array(out, q, shape, qn.dtype, {"q": qn, "k": kn, "v": vn})


def dim_of(q: Array) -> int:
    shape = as_numpy(q, "q", any_strides=True).shape
    return max(shape[-1], 1) if shape else 1


def check_state(state: object, kind: type[Any], **shapes: tuple[int, ...]) -> None:
    """A state of its kind, with arrays of these shapes."""
    if not isinstance(state, kind):
        raise TypeError(f"initial_state: got {type(state).__name__}, expected {kind.__name__}")
    for name, shape in shapes.items():
        got = getattr(state, name)
        if got.shape != shape or got.dtype != np.float32:
            raise ValueError(f"initial_state: got {name} {got.dtype} {got.shape}, expected float32 {shape}")
