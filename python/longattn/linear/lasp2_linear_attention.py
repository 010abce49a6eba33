"""LASP-2: linear attention of a sequence cut over workers, with one gather of their states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import batched, check_floating, dense_inputs, flag, integer, scale_factor
from longattn.dense.attention import attention
from longattn.distributed import shard_rows
from longattn.distributed._workers import Exchange, run_workers
from longattn.methods import Method
from longattn.reference import linear as reference

#: Rows whose products with each other are made as a matrix.
BLOCK = 64

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LaspStats:
    """What workers sent.

    Attributes:
        sent: int64 `[workers]`: bytes that each worker sent to others, once per receiver.
    """

    sent: NDArray[np.int64]


def lasp2_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    workers: int = 4,
    causal: bool = True,
    log_decay: Array | None = None,
    phi: Callable[[Float32], Float32] | None = None,
    normalize: bool = False,
    state: Array | None = None,
    return_state: bool = False,
    return_stats: bool = False,
) -> Any:
    """Linear attention `o_i = q_i S_i`, `S_i = g_i S_(i-1) + k_i^T v_i`, of a sequence that is cut over workers.

    Each worker, a thread here, has a stretch of the sequence. It makes its own state `M_t`, the sum of
    `k_j^T v_j` decayed to the stretch's end, and sends it with the stretch's decay to all others: one gather, whatever
    the length. Meanwhile it computes what its stretch gives itself, `((q k^T) * decays, lower triangle) v`; then it
    adds `q` times the states before it. Not causal, every query gets the sum of all states.

    With `state` and one new row this is the step form: `S = g S + k^T v`, `o = q S`.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, L, D]`, or `[Hkv, L, D]`; any of the three dtypes.
        v: values `[B, Hkv, L, Dv]`, or `[Hkv, L, Dv]`; dtype of `k`.
        workers: stretches of the sequence.
        causal: a query sees keys up to its own position only.
        log_decay: logarithm of the decay `g`, at most 0: floating `[Hkv]`, `[Hkv, L]` or `[B, Hkv, L]`; `None` is no
            decay. With `causal` only. Token `i`'s decay acts on what came before it.
        phi: feature map of queries and keys, float32 `[..., D]` to float32 `[..., F]`; `None`: they come mapped.
        normalize: divide each output by the sum of its weights (0 where that is 0). The paper leaves this to a norm
            after it.
        state: the state before the first row, floating `[B, Hkv, F, Dv]` (or without `B`), with `normalize`
            `[B, Hkv, F, Dv + 1]`; with `causal` only. `None` is zeros.
        return_state: also return the state after the last row, float32.
        return_stats: also return what was sent.

    Returns:
        The output in the shape, kind and dtype of `q` (but for `Dv`); then, where asked for, the state and
        `LaspStats`, as a tuple. Arithmetic is float32. The same bits in every run.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * L * (D + Dv) * 64 + 2 * Hq * L * D * Dv` multiply-adds, matrix products of numpy. A worker sends
        `Hkv * D * Dv` float32 numbers to each other one.

    References:
        W. Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid", 2025,
        arXiv:2502.07563.

    Example:
        >>> import numpy as np, longattn.linear
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 100, 16), dtype=np.float32)
        >>> call = longattn.linear.lasp2_linear_attention
        >>> bool(np.allclose(call(q, k, v, workers=3), call(q, k, v, workers=1), atol=1e-3))
        True
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    causal, normalize = flag(causal, "causal"), flag(normalize, "normalize")
    return_state, return_stats = flag(return_state, "return_state"), flag(return_stats, "return_stats")
    q5, k5, v5, gates = _grouped(qn, kn, vn, log_decay, causal)
    if phi is not None:
        q5, k5 = (_mapped(phi, x) for x in (q5, k5))
    if normalize:
        v5 = np.concatenate([v5, np.ones((*v5.shape[:-1], 1), np.float32)], axis=-1)
    first = _first_state(state, k5, v5, kn.ndim, causal)
    rows = shard_rows(kn.shape[-2], integer(workers, "workers", 1))
    exchange = Exchange(len(rows))

    def work(me: int) -> tuple[Float32, Float32]:
        mine = slice(rows[me][0].start, rows[me][0].stop)
        own_q, own_k, own_v = (x[..., mine, :] for x in (q5, k5, v5))
        decay = _since_start(gates, mine)
        if not causal:
            states = exchange.all_gather(me, "states", own_k.swapaxes(-1, -2) @ own_v)
            whole = sum(states[1:], states[0])
            return own_q @ whole, whole
        # The own state needs no queries, so that it can be sent first.
        own = _state(own_k, own_v, decay)
        for other in range(len(rows)):
            exchange.send(me, other, me, (own, _last(decay)))
        out = _within(own_q, own_k, own_v, decay)
        before, carried = first, first
        for other in range(len(rows)):
            if other == me:
                before = carried
            sent, passed = exchange.receive(me, other)
            carried = np.exp(passed)[..., None, None].astype(np.float32) * carried + sent
        return out + _scaled(own_q, decay) @ before, carried

    shape = (*q5.shape[:-1], v5.shape[-1])
    parts = run_workers(exchange, work)
    out, last = np.empty(shape, np.float32), parts[-1][1]
    for mine, (part, _) in zip(rows, parts, strict=True):
        out[..., mine[0].start : mine[0].stop, :] = part
    if normalize:
        mass = out[..., -1:]
        out = np.divide(out[..., :-1], mass, out=np.zeros((*shape[:-1], shape[-1] - 1), np.float32), where=mass != 0)
    result = out.reshape(*qn.shape[:-1], out.shape[-1]).astype(qn.dtype, copy=False)
    found: tuple[Any, ...] = (like(q, result),)
    if return_state:
        flat = last[:, :, 0]
        found += (like(q, np.ascontiguousarray(flat if kn.ndim == 4 else flat[0])),)
    if return_stats:
        found += (LaspStats(exchange.sent),)
    return found if len(found) > 1 else found[0]


def lasp2_linear_attention_backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    workers: int = 4,
    causal: bool = True,
    log_decay: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of `lasp2_linear_attention` by queries, keys and values; decays are constants.

    Each worker sends its state `M_t` and `dM_t = q^T d_out`, decayed to the stretch's start, in one gather. Gradients
    of queries take the states before a stretch, those of keys and values the `dM_s` after it.

    Args:
        d_out: gradient of the output, its shape; float32, float16 or bfloat16.
        q: queries, as in the forward call (mapped, where that had `phi`).
        k: keys, likewise.
        v: values.
        workers: as in the forward call.
        causal: as in the forward call.
        log_decay: as in the forward call.

    Returns:
        `(dq, dk, dv)` in the shapes and dtypes of `q`, `k` and `v` and the kind of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Three times that of the forward call; a worker sends `2 * Hkv * D * Dv` float32 numbers to each other one.
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    causal = flag(causal, "causal")
    given = as_numpy(d_out, "d_out")
    check_floating(given, "d_out")
    shape = (*qn.shape[:-1], vn.shape[-1])
    if given.shape != shape:
        raise ValueError(f"d_out: got shape {given.shape}, expected {shape}")
    q5, k5, v5, gates = _grouped(qn, kn, vn, log_decay, causal)
    d5 = np.asarray(given, np.float32).reshape(*q5.shape[:-1], vn.shape[-1])
    rows = shard_rows(kn.shape[-2], integer(workers, "workers", 1))
    exchange = Exchange(len(rows))

    def work(me: int) -> tuple[Float32, Float32, Float32]:
        mine = slice(rows[me][0].start, rows[me][0].stop)
        own_q, own_k, own_v, own_d = (x[..., mine, :] for x in (q5, k5, v5, d5))
        decay = _since_start(gates, mine)
        total = _last(decay)
        back = (total[..., None] - decay) if decay.size else decay  # from a row to the stretch's end
        ahead = (_scaled(own_q, decay).swapaxes(-1, -2) @ own_d).sum(axis=2, keepdims=True)
        gathered = exchange.all_gather(me, "states", (_state(own_k, own_v, decay), ahead, total))
        if not causal:
            m, dm = (sum((x[n] for x in gathered[1:]), gathered[0][n]) for n in (0, 1))
            return own_d @ m.swapaxes(-1, -2), own_v @ dm.swapaxes(-1, -2), own_k @ dm
        before = _carried([(m, passed) for m, _, passed in gathered[:me]], gathered[me][0])
        after = _carried([(dm, passed) for _, dm, passed in gathered[:me:-1]], gathered[me][1])
        dq = _within(own_d, own_v, own_k, decay) + _scaled(own_d, decay) @ before.swapaxes(-1, -2)

        def later(out_of: Float32, keys: Float32, values: Float32, carried: Float32) -> Float32:
            """What rows get from those at and after them: time runs backwards."""
            shape = own_q.shape[:-1]
            queries, sources, sums = (
                np.broadcast_to(x, (*shape, x.shape[-1]))[..., ::-1, :] for x in (out_of, keys, values)
            )
            own = _within(queries, sources, sums, -decay[..., ::-1])[..., ::-1, :]
            found: Float32 = own.sum(axis=2, keepdims=True) + _scaled(out_of, back) @ carried
            return found

        dk = later(own_v, own_d, own_q, after.swapaxes(-1, -2))
        return dq, dk, later(own_k, own_q, own_d, after)

    gradients = [np.empty(x.shape, np.float32) for x in (q5, k5, v5)]
    for mine, parts in zip(rows, run_workers(exchange, work), strict=True):
        for whole, part in zip(gradients, parts, strict=True):
            whole[..., mine[0].start : mine[0].stop, :] = part if whole is gradients[0] else part.sum(2, keepdims=True)
    dq, dk, dv = (
        like(q, x.reshape(of.shape).astype(of.dtype, copy=False)) for x, of in zip(gradients, (qn, kn, vn), strict=True)
    )
    return dq, dk, dv


def lasp2_hybrid_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    workers: int = 4,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Any:
    """LASP-2H: softmax attention of a hybrid model's other layers, over the same workers.

    Each worker gathers the keys and values of all and attends with its own queries.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, L, D]`, or `[Hkv, L, D]`; any of the three dtypes.
        v: values `[B, Hkv, L, Dv]`, or `[Hkv, L, Dv]`; dtype of `k`.
        workers: stretches of the sequence.
        causal: a query sees keys up to its own position only.
        scale: factor on the logits; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp of the logits.
        return_stats: also return what was sent.

    Returns:
        As `longattn.attention`, with `return_stats` and `LaspStats` behind.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        That of `longattn.attention` in all; a worker sends its `Hkv * n * (D + Dv)` numbers to each other one.
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    factor, causal = scale_factor(scale, qn.shape[-1]), flag(causal, "causal")
    return_lse, return_stats = flag(return_lse, "return_lse"), flag(return_stats, "return_stats")
    if qn.shape[-2] != kn.shape[-2]:
        raise ValueError(f"k: got length {kn.shape[-2]}, expected {qn.shape[-2]} as in q")
    rows = shard_rows(qn.shape[-2], integer(workers, "workers", 1))
    exchange = Exchange(len(rows))
    out, lse = np.empty((*qn.shape[:-1], vn.shape[-1]), qn.dtype), np.empty(qn.shape[:-1], np.float32)

    def work(me: int) -> None:
        mine = slice(rows[me][0].start, rows[me][0].stop)
        parts = exchange.all_gather(me, "rows", (kn[..., mine, :], vn[..., mine, :]))
        seen = parts[: me + 1] if causal else parts
        keys, values = (np.concatenate([x[n] for x in seen], axis=-2) for n in (0, 1))
        out[..., mine, :], lse[..., mine] = attention(
            qn[..., mine, :], keys, values, causal=causal, scale=factor, return_lse=True
        )

    run_workers(exchange, work)
    found: tuple[Any, ...] = (like(q, out),)
    if return_lse:
        found += (like(q, lse),)
    if return_stats:
        found += (LaspStats(exchange.sent),)
    return found if len(found) > 1 else found[0]


def _grouped(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], log_decay: Array | None, causal: bool
) -> tuple[Float32, Float32, Float32, NDArray[np.float64]]:
    """Float32 queries `[B, Hkv, G, L, D]`, keys and values `[B, Hkv, 1, L, D]`, and log decays `[B, Hkv, 1, L]`."""
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(f"k: got length {k.shape[-2]}, expected {q.shape[-2]} as in q")
    q4, k4, v4 = (batched(np.asarray(x, np.float32), 4) for x in (q, k, v))
    batch, kv_heads, length, _ = k4.shape
    gates = np.zeros((batch, kv_heads, length))
    if log_decay is not None:
        if not causal:
            raise ValueError("log_decay: got decays with causal=False, expected None: they have a direction")
        x = as_numpy(log_decay, "log_decay")
        check_floating(x, "log_decay")
        shapes = ((kv_heads,), (kv_heads, length), (batch, kv_heads, length))
        if x.shape not in shapes:
            raise ValueError(f"log_decay: got shape {x.shape}, expected {shapes[0]}, {shapes[1]} or {shapes[2]}")
        if not (np.isfinite(x.astype(np.float64)).all() and (x <= 0).all()):
            raise ValueError("log_decay: got numbers above 0 or not finite, expected finite ones of at most 0")
        gates += x[:, None] if x.shape == (kv_heads,) else x
    q5 = q4.reshape(batch, kv_heads, q4.shape[1] // kv_heads, length, q4.shape[3])
    return q5, k4[:, :, None], v4[:, :, None], gates[:, :, None]


def _mapped(phi: Callable[[Float32], Float32], x: Float32) -> Float32:
    features = np.asarray(phi(x))
    if features.ndim != x.ndim or features.shape[:-1] != x.shape[:-1] or features.dtype.kind != "f":
        raise ValueError(f"phi: got {features.dtype} {features.shape} of {x.shape}, expected floats of those rows")
    return features.astype(np.float32, copy=False)


def _first_state(state: Array | None, k: Float32, v: Float32, rank: int, causal: bool) -> Float32:
    shape = (*k.shape[:2], k.shape[-1], v.shape[-1])
    if state is None:
        return np.zeros((*shape[:2], 1, *shape[2:]), np.float32)
    if not causal:
        raise ValueError("state: got one with causal=False, expected None")
    x = as_numpy(state, "state")
    check_floating(x, "state")
    expected = shape if rank == 4 else shape[1:]
    if x.shape != expected:
        raise ValueError(f"state: got shape {x.shape}, expected {expected}")
    return np.asarray(batched(x, 4), np.float32)[:, :, None]


def _since_start(gates: NDArray[np.float64], mine: slice) -> NDArray[np.float64]:
    """Log of the decays from a stretch's start to each row, that row's included."""
    return np.cumsum(gates[..., mine], axis=-1)


def _last(decay: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of a stretch's decay; 0 for an empty one."""
    return decay[..., -1] if decay.shape[-1] else np.zeros(decay.shape[:-1])


def _scaled(x: Float32, logs: NDArray[np.float64]) -> Float32:
    return x * np.exp(logs)[..., None].astype(np.float32)


def _state(k: Float32, v: Float32, decay: NDArray[np.float64]) -> Float32:
    """Sum of `k_j^T v_j`, decayed to the last row."""
    return _scaled(k, _last(decay)[..., None] - decay).swapaxes(-1, -2) @ v


def _carried(parts: list[tuple[Float32, NDArray[np.float64]]], like_this: Float32) -> Float32:
    """States of stretches one after another, each decayed by those that follow it."""
    carried = np.zeros_like(like_this)
    for state, passed in parts:
        carried = np.exp(passed)[..., None, None].astype(np.float32) * carried + state
    return carried


def _within(q: Float32, k: Float32, v: Float32, decay: NDArray[np.float64]) -> Float32:
    """What rows get from those at and before them in the same stretch, a block of rows at a time."""
    out = np.empty((*q.shape[:-1], v.shape[-1]), np.float32)
    state = np.zeros((*np.broadcast_shapes(k.shape[:-2], v.shape[:-2]), k.shape[-1], v.shape[-1]), np.float32)
    end = decay[..., :1]  # log decay that the state is at
    for at in range(0, q.shape[-2], BLOCK):
        rows = slice(at, at + BLOCK)
        logs, some_q, some_k, some_v = decay[..., rows], q[..., rows, :], k[..., rows, :], v[..., rows, :]
        between = logs[..., :, None] - logs[..., None, :]
        weights = np.exp(np.where(np.tri(logs.shape[-1], dtype=bool), between, -np.inf)).astype(np.float32)
        out[..., rows, :] = (weights * (some_q @ some_k.swapaxes(-1, -2))) @ some_v + _scaled(
            some_q, logs - end
        ) @ state
        passed = np.exp(logs[..., -1:] - end)[..., None].astype(np.float32)
        state = passed * state + _state(some_k, some_v, logs)
        end = logs[..., -1:]
    return out


METHOD = Method(
    name="lasp2_linear_attention",
    family="linear",
    title="LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid",
    year=2025,
    arxiv="2502.07563",
    function=lasp2_linear_attention,
    reference=reference.lasp2_linear_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=True,
    checks=(
        "The result does not depend on the number of workers; one worker is the quadratic form.",
        "A decay of 1 is the plain form.",
        "The hybrid's softmax attention is attention for any number of workers.",
        "Steps with a state give the rows of the whole.",
        "Gradients are those of the quadratic form.",
    ),
    tests="tests/linear/test_lasp2_linear_attention.py",
    cost="`Hq * L * (D + Dv) * 64 + 2 * Hq * L * D * Dv` multiply-adds; a worker sends `Hkv * D * Dv` float32 numbers "
    "to each other one.",
)
