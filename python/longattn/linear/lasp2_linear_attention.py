"""LASP-2: linear attention of a sequence cut over workers, with one gather of their states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import (
    batched,
    check_float_storage,
    check_floating,
    dense_inputs,
    flag,
    function,
    integer,
    scale_factor,
)
from longattn.dense.attention import attention
from longattn.distributed import shard_rows
from longattn.distributed._workers import Exchange, run_workers
from longattn.linear._recurrence import Common, recurrence
from longattn.linear.lasp2_shards import exclusive_states, shard_state
from longattn.linear.recurrence_backward import recurrence_backward
from longattn.methods import Method
from longattn.reference import linear as reference

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
    the length (`shard_state`). What all sent gives it the state before its stretch (`exclusive_states`), from which
    the recurrence goes on. Not causal, every query gets the sum of all states.

    With `state`, one worker and one new row this is the step form: `S = g S + k^T v`, `o = q S`.

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
        That of `gated_linear_attention`, and `Hkv * L * D * Dv` multiply-adds of the states where there are other
        workers, to each of which a worker sends `Hkv * D * Dv` float32 numbers.

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
    q4, k4, v4, g = _inputs(qn, kn, vn, log_decay, causal)
    if phi is not None:
        q4, k4 = (_mapped(phi, x) for x in (q4, k4))
    summed = v4
    if normalize:
        summed = np.concatenate([v4.astype(np.float32), np.ones((*v4.shape[:-1], 1), np.float32)], axis=-1)
    first = _first_state(state, k4, summed, kn.ndim, causal)
    rows = shard_rows(kn.shape[-2], integer(workers, "workers", 1))
    exchange = Exchange(len(rows))
    out = np.empty((*q4.shape[:-1], v4.shape[-1]), qn.dtype)

    def work(me: int) -> Any:
        mine = slice(rows[me][0].start, rows[me][0].stop)
        own_q, own_k, own_v, own_sums = (x[..., mine, :] for x in (q4, k4, v4, summed))
        if not causal:
            states = exchange.all_gather(me, "states", _product(own_k, own_sums))
            whole = sum(states[1:], states[0])
            out[..., mine, :] = _divided(_of_groups(own_q, whole), normalize)
            return whole
        own_g, before, last = None if g is None else g[..., mine], first, None
        if len(rows) > 1:
            gathered = exchange.all_gather(me, "states", shard_state(own_k, own_sums, g=own_g))
            all_before, last = exclusive_states(*zip(*gathered, strict=True), initial_state=first)
            before = all_before[me]
        common = Common(1.0, before)
        found, after = recurrence(own_q, own_k, own_v, common, g=own_g, normaliser=0.0 if normalize else None)
        out[..., mine, :] = found
        return after if last is None else last

    last = run_workers(exchange, work)[0]
    result = out.reshape(*qn.shape[:-1], out.shape[-1])
    found: tuple[Any, ...] = (like(q, result),)
    if return_state:
        found += (like(q, last if kn.ndim == 4 else last[0]),)
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
    check_float_storage(given, "d_out")
    shape = (*qn.shape[:-1], vn.shape[-1])
    if given.shape != shape:
        raise ValueError(f"d_out: got shape {given.shape}, expected {shape}")
    q4, k4, v4, g = _inputs(qn, kn, vn, log_decay, causal)
    d4 = batched(given, 4)
    rows = shard_rows(kn.shape[-2], integer(workers, "workers", 1))
    exchange = Exchange(len(rows))
    gradients = tuple(np.empty(x.shape, x.dtype) for x in (q4, k4, v4))

    def work(me: int) -> None:
        mine = slice(rows[me][0].start, rows[me][0].stop)
        own_q, own_k, own_v, own_d = (x[..., mine, :] for x in (q4, k4, v4, d4))
        parts: tuple[NDArray[Any], ...]
        if causal:
            own_g = None if g is None else g[..., mine]
            # What the stretch's outputs say of the state before it.
            seen = own_q if own_g is None else own_q * _from_start(own_g, own_q)
            state, decay = shard_state(own_k, own_v, g=own_g)
            gathered = exchange.all_gather(me, "states", (state, _product(seen, own_d, own_k.shape[1]), decay))
            states, ahead, decays = zip(*gathered, strict=True)
            before = exclusive_states(states, decays)[0][me]
            after = exclusive_states(ahead[::-1], decays[::-1])[0][-1 - me]
            of = recurrence_backward(own_d, after, own_q, own_k, own_v, g=own_g, scale=1.0, initial_state=before)
            parts = of.dq, of.dk, of.dv
        else:
            sums = _product(own_k, own_v), _product(own_q, own_d, own_k.shape[1])
            gathered = exchange.all_gather(me, "states", sums)
            m, dm = (sum((x[n] for x in gathered[1:]), gathered[0][n]) for n in (0, 1))
            parts = (
                _of_groups(own_d, m.swapaxes(-1, -2)),
                _of_groups(own_v, dm.swapaxes(-1, -2)),
                _of_groups(own_k, dm),
            )
        for whole, part in zip(gradients, parts, strict=True):
            whole[..., mine, :] = part

    run_workers(exchange, work)
    dq, dk, dv = (like(q, d.reshape(x.shape)) for d, x in zip(gradients, (qn, kn, vn), strict=True))
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


def _inputs(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], log_decay: Array | None, causal: bool
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], Float32 | None]:
    """Queries, keys and values of rank 4, and log decays `[B, Hkv, L]`, `None` where there are none."""
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(f"k: got length {k.shape[-2]}, expected {q.shape[-2]} as in q")
    q4, k4, v4 = (batched(x, 4) for x in (q, k, v))
    if log_decay is None:
        return q4, k4, v4, None
    batch, kv_heads, length, _ = k4.shape
    if not causal:
        raise ValueError("log_decay: got decays with causal=False, expected None: they have a direction")
    x = as_numpy(log_decay, "log_decay")
    check_floating(x, "log_decay")
    shapes = ((kv_heads,), (kv_heads, length), (batch, kv_heads, length))
    if x.shape not in shapes:
        raise ValueError(f"log_decay: got shape {x.shape}, expected {shapes[0]}, {shapes[1]} or {shapes[2]}")
    if not (np.isfinite(x.astype(np.float64)).all() and (x <= 0).all()):
        raise ValueError("log_decay: got numbers above 0 or not finite, expected finite ones of at most 0")
    if not x.any():
        return q4, k4, v4, None
    g = np.broadcast_to(x[:, None] if x.shape == (kv_heads,) else x, shapes[2])
    return q4, k4, v4, np.ascontiguousarray(g, np.float32)


def _mapped(phi: Callable[[Float32], Float32], x: NDArray[Any]) -> Float32:
    function(phi, "phi")
    features = np.asarray(phi(np.asarray(x, np.float32)))
    if features.ndim != x.ndim or features.shape[:-1] != x.shape[:-1] or features.dtype.kind != "f":
        raise ValueError(f"phi: got {features.dtype} {features.shape} of {x.shape}, expected floats of those rows")
    return features.astype(np.float32, copy=False)


def _first_state(state: Array | None, k: NDArray[Any], v: NDArray[Any], rank: int, causal: bool) -> NDArray[Any] | None:
    if state is None:
        return None
    if not causal:
        raise ValueError("state: got one with causal=False, expected None")
    shape = (*k.shape[:2], k.shape[-1], v.shape[-1])
    x = as_numpy(state, "state")
    check_floating(x, "state")
    expected = shape if rank == 4 else shape[1:]
    if x.shape != expected:
        raise ValueError(f"state: got shape {x.shape}, expected {expected}")
    return batched(x, 4)


def _product(x: NDArray[Any], y: NDArray[Any], heads: int | None = None) -> Float32:
    """`sum_i x_i^T y_i` of each head, or of each of `heads` groups of heads."""
    found = np.asarray(x, np.float32).swapaxes(-1, -2) @ np.asarray(y, np.float32)
    if heads is not None:
        found = reshaped(found, found.shape[0], heads, -1, *found.shape[2:]).sum(axis=2)
    return found


def _of_groups(x: NDArray[Any], states: Float32) -> Float32:
    """Rows times the state of their head's group."""
    batch, heads, length, dim = x.shape
    grouped = np.asarray(x, np.float32).reshape(batch, states.shape[1], heads // states.shape[1], length, dim)
    return (grouped @ states[:, :, None]).reshape(batch, heads, length, states.shape[-1])


def _divided(sums: Float32, normalize: bool) -> Float32:
    """Less the last column, divided by it where it is not 0."""
    if not normalize:
        return sums
    mass = sums[..., -1:]
    return np.divide(
        sums[..., :-1], mass, out=np.zeros((*sums.shape[:-1], sums.shape[-1] - 1), np.float32), where=mass != 0
    )


def _from_start(g: Float32, q: NDArray[Any]) -> Float32:
    """Decays from a stretch's start to each row, that row's included, for each head of `q`."""
    decays = np.exp(np.cumsum(g, axis=-1, dtype=np.float64)).astype(np.float32)
    return np.repeat(decays, q.shape[1] // g.shape[1], axis=1)[..., None]


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
    cost="That of `gated_linear_attention`, and `Hkv * L * D * Dv` multiply-adds of the states; a worker sends "
    "`Hkv * D * Dv` float32 numbers to each other one.",
)
