"""Causal forms of the methods over all keys: sums over the rows so far, read by each row.

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
from longattn._checks import (
    batched,
    check_float_storage,
    check_floating,
    finite,
    per_head,
    result_array,
    returned,
    scale_factor,
)
from longattn.linear._documented import documented
from longattn.linear._local import add_causal_convolution
from longattn.linear._recurrence import CHUNK, Common, recurrence
from longattn.linear.feature_map import FeatureMap, feature_map
from longattn.linear.focused_linear_attention import focusing

Float32 = NDArray[np.float32]


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
class RunningSoftmax:
    """A softmax over the positions so far, for each channel of the keys, float32.

    Attributes:
        means: `[B, H, D, Dv]`: means of the values by these weights.
        logs: `[B, H, D]`: logarithms of the sums of `e^k`; minus infinity before the first row.
    """

    means: Float32
    logs: Float32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LocalState:
    """Sums over the rows so far, and the last values that a convolution sees, float32.

    Attributes:
        states: `[B, H, D, Dv + 1]`: `S` and, as the last column, `z`.
        before: `[B, H, K - 1, Dv]`.
    """

    states: Float32
    before: Float32


@documented
def causal_efficient_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    norm: str = "softmax",
    initial_state: RunningSoftmax | RunningStatistics | None = None,
    chunk_size: int = CHUNK,
    out: Array | None = None,
) -> tuple[Array, RunningSoftmax | RunningStatistics]:
    """Efficient attention over the rows so far: `o_t = rho_q(q_t)^T sum_(j <= t) rho(k_j) v_j^T`.

    With `norm="softmax"` a channel of the keys weighs the rows so far by their softmax: running means of the values
    that decay by what the rows before keep of it. With "scaling" the sum is divided by the number of rows so far.

    Args:
        q: {queries}
        k: {own_keys}
        v: {own_values}
        norm: "softmax" or "scaling".
        initial_state: {going_on}
        chunk_size: {chunk_size}
        out: array for the output.

    Returns:
        `(output, state)`: the output in the kind and dtype of `q`, and `RunningSoftmax`, or with "scaling"
        `RunningStatistics`. A call of one row is the decode step.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * Hq * L * D * Dv` multiply-adds of states and an exponential per number of `k`; memory of a float32 array
        like `k`.

    References:
        Z. Shen et al., "Efficient Attention: Attention with Linear Complexities", 2018, arXiv:1812.01243.
    """
    if norm not in ("softmax", "scaling"):
        raise ValueError(f"norm: got {norm!r}, expected 'softmax' or 'scaling'")
    if norm == "scaling":
        return _attend(q, k, v, None, ("plain_means", 1.0, 0.0), initial_state, chunk_size, out)
    rows = _rows(q, k, v)
    batch, heads, _, dim = rows[1].shape
    means, logs = None, np.full((batch, heads, dim), -np.inf, np.float32)
    if initial_state is not None:
        _check(initial_state, RunningSoftmax, logs=logs.shape, means=(batch, heads, dim, rows[2].shape[3]))
        assert isinstance(initial_state, RunningSoftmax)
        means, logs = initial_state.means, initial_state.logs.copy()
    kept = np.empty(rows[1].shape, np.float32)
    _core.running_softmax(rows[1], logs, kept)
    result = _result(q, rows, out)
    maps = (FeatureMap(kind="softmax"), None)
    _, after = recurrence(
        rows[0], None, rows[2], Common(1.0, means, None, chunk_size, None, batched(result, 4)), g=kept, channels=True,
        tied=True, maps=maps,
    )  # fmt: skip
    return returned(out, q, result, None), RunningSoftmax(means=np.asarray(after, np.float32), logs=logs)


@documented
def causal_focused_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    power: float = 3.0,
    channel_scale: Array | None = None,
    norm_scope: str = "all",
    eps: float = 1e-6,
    weight: Array | None = None,
    initial_state: LocalState | None = None,
    chunk_size: int = CHUNK,
    out: Array | None = None,
) -> tuple[Array, LocalState]:
    """Focused linear attention over the rows so far, and a causal convolution of the values.

    `o_t = phi(q_t)^T S_t / (phi(q_t)^T z_t + eps)` with the map of `focused_linear_attention`. Positions are added to
    keys beforehand.

    Args:
        q: {queries}
        k: {own_keys}
        v: {own_values}
        power: the exponent `p`, above 0.
        channel_scale: floating `[H * D]`; features are divided by its softplus; `None` is zeros.
        norm_scope: "all": lengths are kept over all heads of a row; "head": in each.
        eps: added to the divisor.
        weight: {taps}
        initial_state: {going_on}
        chunk_size: {chunk_size}
        out: array for the output.

    Returns:
        {local}

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * Hq * L * D * Dv` multiply-adds of states, `Hq * L * K * Dv` of the convolution.

    References:
        D. Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", 2023, arXiv:2308.00442.
    """
    qn, kn, _ = rows = _rows(q, k, v)
    maps = focusing(qn, kn, power, channel_scale, norm_scope)
    return _divide(q, rows, maps, eps, weight, initial_state, chunk_size, out)


@documented
def causal_simplified_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    eps: float = 1e-6,
    weight: Array | None = None,
    initial_state: LocalState | None = None,
    chunk_size: int = CHUNK,
    out: Array | None = None,
) -> tuple[Array, LocalState]:
    """Simplified linear attention over the rows so far, `o_t = relu(q_t)^T S_t / (relu(q_t)^T z_t + eps)`.

    UNSURE: the paper's language models; here the convolution of the values is causal, along rows, and may be left out.

    Args:
        q: {queries}
        k: {own_keys}
        v: {own_values}
        eps: added to the divisor.
        weight: {taps}
        initial_state: {going_on}
        chunk_size: {chunk_size}
        out: array for the output.

    Returns:
        {local}

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * Hq * L * D * Dv` multiply-adds of states, `Hq * L * K * Dv` of the convolution.

    References:
        J. Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
        Re-parameterized Batch Normalization", 2024, arXiv:2405.11582.
    """
    return _divide(q, _rows(q, k, v), (_RELU, _RELU), eps, weight, initial_state, chunk_size, out)


@documented
def causal_magnitude_aware_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    phi: str | FeatureMap = "elu1",
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: RunningStatistics | None = None,
    chunk_size: int = CHUNK,
    out: Array | None = None,
) -> tuple[Array, RunningStatistics]:
    """Magnitude-aware linear attention over the `t` rows so far.

    Weights `(1 + 1 / (m_t + eps)) s phi(q_t)^T phi(k_j) / t - m_t / t`, `m_t = s phi(q_t)^T z_t / t`.

    Args:
        q: {queries}
        k: {own_keys}
        v: {own_values}
        phi: the map of queries and keys, or its name.
        scale: the factor `s`; `None` is `D ** -0.5`.
        eps: added to `m_t` in the denominator.
        initial_state: {going_on}
        chunk_size: {chunk_size}
        out: array for the output.

    Returns:
        {running}

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * Hq * L * F * Dv` multiply-adds of states; memory of a float32 array like the output.

    References:
        Q. Fan et al., "Rectifying Magnitude Neglect in Linear Attention", 2025, arXiv:2507.00698.
    """
    read_out = ("magnitude", scale_factor(scale, _dim(q)), finite(eps, "eps", 0))
    return _attend(q, k, v, feature_map(phi), read_out, initial_state, chunk_size, out)


@documented
def causal_inline_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    phi: str | FeatureMap = "identity",
    scale: float | None = None,
    initial_state: RunningStatistics | None = None,
    chunk_size: int = CHUNK,
    out: Array | None = None,
) -> tuple[Array, RunningStatistics]:
    """InLine attention over the `t` rows so far, weights `s phi(q_t)^T phi(k_j) / t - m_t / t + 1 / t`.

    `m_t = s phi(q_t)^T z_t / t`.

    Args:
        q: {queries}
        k: {own_keys}
        v: {own_values}
        phi: the map of queries and keys, or its name.
        scale: the factor `s`; `None` is `D ** -0.5`.
        initial_state: {going_on}
        chunk_size: {chunk_size}
        out: array for the output.

    Returns:
        {running}

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * Hq * L * F * Dv` multiply-adds of states; memory of a float32 array like the output.

    References:
        D. Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", 2024, arXiv:2412.06590.
    """
    read_out = ("subtract", scale_factor(scale, _dim(q)), 0.0)
    return _attend(q, k, v, feature_map(phi), read_out, initial_state, chunk_size, out)


@documented
def causal_l2vit_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    tau: Array | None = None,
    den_min: float = 100.0,
    initial_state: RunningStatistics | None = None,
    chunk_size: int = CHUNK,
    out: Array | None = None,
) -> tuple[Array, RunningStatistics]:
    """Linear attention of L2ViT over the rows so far, `tau_h relu(q_t)^T S_t / max(relu(q_t)^T z_t, den_min)`.

    Args:
        q: {queries}
        k: {own_keys}
        v: {own_values}
        tau: floating `[Hq]`, learned factors of the output; `None` is `D ** -0.5`.
        den_min: the least denominator, at least 0.
        initial_state: {going_on}
        chunk_size: {chunk_size}
        out: array for the output.

    Returns:
        {running}

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * Hq * L * D * Dv` multiply-adds of states; memory of a float32 array like the output.

    References:
        C. Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025, arXiv:2501.16182.
    """
    least, heads = finite(den_min, "den_min"), _rows(q, k, v)[0].shape[1]
    if least < 0:
        raise ValueError(f"den_min: got {den_min}, expected at least 0")
    factors = np.full(heads, _dim(q) ** -0.5, np.float32) if tau is None else per_head(tau, "tau", heads)
    return _attend(q, k, v, _RELU, ("clamp", least, 0.0), initial_state, chunk_size, out, factors)


_RELU = FeatureMap(kind="relu")


def _attend(
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
    qn, kn, vn = rows = _rows(q, k, v)
    batch, heads, length, value_dim = vn.shape
    features = qn.shape[3] if phi is None else phi.features(qn.shape[3])
    states, sums, count = None, np.zeros((batch, heads, value_dim), np.float32), 0
    if initial_state is not None:
        _check(initial_state, RunningStatistics, states=(batch, heads, features, value_dim + 1), values=sums.shape)
        assert isinstance(initial_state, RunningStatistics)
        states, sums, count = initial_state.states, initial_state.values.copy(), initial_state.count
    result = _result(q, rows, out)
    # Values of 1 beside the values have the sums of weights.
    wide = np.concatenate([vn, np.ones((*vn.shape[:3], 1), vn.dtype)], axis=3)
    maps = (phi, phi) if phi is not None and phi.kind != "identity" else (None, None)
    common = Common(1.0, states, None, chunk_size)
    read, after = recurrence(qn, kn, wide, common, maps=maps, dtype=np.dtype(np.float32))
    _core.running_read(np.asarray(read), vn, sums, count, read_out, factors, batched(result, 4))
    last = RunningStatistics(states=np.asarray(after, np.float32), values=sums, count=count + length)
    return returned(out, q, result, None), last


def _divide(
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
        _check(initial_state, LocalState, states=(batch, heads, qn.shape[3], value_dim + 1), before=before.shape)
        assert isinstance(initial_state, LocalState)
        states, before = initial_state.states, initial_state.before
    result = _result(q, rows, out)
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


def _rows(q: Array, k: Array, v: Array) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
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


def _result(q: Array, rows: tuple[NDArray[Any], NDArray[Any], NDArray[Any]], out: Array | None) -> NDArray[Any]:
    qn, kn, vn = rows
    shape = (*qn.shape[:3], vn.shape[3])[4 - len(q.shape) :]
    return result_array(out, q, shape, qn.dtype, {"q": qn, "k": kn, "v": vn})


def _dim(q: Array) -> int:
    shape = as_numpy(q, "q", any_strides=True).shape
    return max(shape[-1], 1) if shape else 1


def _check(state: object, kind: type[Any], **shapes: tuple[int, ...]) -> None:
    """A state of its kind, with arrays of these shapes."""
    if not isinstance(state, kind):
        raise TypeError(f"initial_state: got {type(state).__name__}, expected {kind.__name__}")
    for name, shape in shapes.items():
        got = getattr(state, name)
        if got.shape != shape or got.dtype != np.float32:
            raise ValueError(f"initial_state: got {name} {got.dtype} {got.shape}, expected float32 {shape}")
