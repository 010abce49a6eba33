"""BurstAttention: exact attention of a sequence cut over workers in a ring, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import carried_state, check_floating, dense_inputs, flag, integer, one_of, scale_factor
from longattn.dense.attention import attention
from longattn.dense.attention_backward import attention_backward
from longattn.distributed._workers import Exchange, run_workers
from longattn.methods import Method
from longattn.reference import distributed as reference

Layout = Literal["contiguous", "zigzag", "striped"]
Travel = Literal["queries", "keys"]

#: Rows of a shard: positions, as ranges of one step.
Rows = Sequence[range]


_Gradients: TypeAlias = tuple[NDArray[Any], ...]


@dataclass(frozen=True, slots=True)
class BurstStats:
    """What workers sent.

    Attributes:
        sent: int64 `[workers]`: bytes that each worker sent to others.
        rounds: rounds of the ring.
        travel: what went around: "keys" (with values) or "queries" (with what belongs to them).
    """

    sent: NDArray[np.int64]
    rounds: int
    travel: Travel


#: Workers are threads.
MOST_WORKERS = 1024


def shard_rows(length: int, workers: int, layout: Layout = "contiguous") -> list[tuple[range, ...]]:
    """Which rows each worker holds.

    Args:
        length: rows of the sequence.
        workers: number of workers, at most 1024.
        layout: `"contiguous"`: one stretch each, late ones having all the work of a causal mask. `"zigzag"`: of twice
            as many stretches, the `r`-th from the front and the `r`-th from the back. `"striped"`: every
            `workers`-th row.

    Returns:
        For each worker its positions, as ranges in the order of its rows. Lengths that cannot be cut evenly give
        shards that differ by a row per stretch; some may be empty.

    Raises:
        TypeError: a number is no integer.
        ValueError: a number out of range, or another layout.

    Example:
        >>> import longattn.distributed
        >>> longattn.distributed.shard_rows(8, 2, "zigzag")
        [(range(0, 2), range(6, 8)), (range(2, 4), range(4, 6))]
    """
    total, count = integer(length, "length", 0), integer(workers, "workers", 1, MOST_WORKERS)
    one_of(layout, "layout", get_args(Layout))
    if layout == "striped":
        return [(range(worker, total, count),) for worker in range(count)]
    parts = count if layout == "contiguous" else 2 * count
    ends = [total * n // parts for n in range(parts + 1)]
    stretches = [range(ends[n], ends[n + 1]) for n in range(parts)]
    if layout == "contiguous":
        return [(stretch,) for stretch in stretches]
    return [(stretches[worker], stretches[-1 - worker]) for worker in range(count)]


def shard_attention(
    q: Array,
    k: Array,
    v: Array,
    q_rows: Rows,
    k_rows: Rows,
    *,
    causal: bool = False,
    scale: float | None = None,
    state: tuple[Array, Array] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a worker computes in a round: its queries over one shard of keys, added to what it has.

    Args:
        q: queries of a shard, `[B, Hq, n, D]` or `[Hq, n, D]`; float32, float16 or bfloat16.
        k: keys of a shard, `[B, Hkv, m, D]` or `[Hkv, m, D]`; any of the three dtypes.
        v: values `[B, Hkv, m, Dv]` or `[Hkv, m, Dv]`; dtype of `k`.
        q_rows: positions of the queries, as `shard_rows` gives them.
        k_rows: positions of the keys, in ranges of the same step.
        causal: a query sees keys up to its own position only.
        scale: factor on the logits; `None` is `D ** -0.5`.
        state: pair `(o, lse)` of the rounds before; `None` at first.

    Returns:
        The pair `(o, lse)` over the keys so far, float32, in the shapes of the output and of its rows. A query that
        saw no key yet has 0 and -inf.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or rows that do not fit.

    Cost:
        That of `longattn.attention` over the pairs that are visible.
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    factor, causal = scale_factor(scale, qn.shape[-1]), flag(causal, "causal")
    _check_rows(q_rows, "q_rows", qn.shape[-2])
    _check_rows(k_rows, "k_rows", kn.shape[-2])
    shape = (*qn.shape[:-1], vn.shape[-1])
    if state is None:
        out, lse = np.zeros(shape, np.float32), np.full(shape[:-1], -np.inf, np.float32)
    else:
        before, sums = carried_state(state, shape, shape[:-1])
        out, lse = before.astype(np.float32), sums.copy()
    wide = np.asarray(qn, np.float32)
    for rows, keys, masked in _visible_parts(q_rows, k_rows, causal):
        out[..., rows, :], lse[..., rows] = attention(
            wide[..., rows, :],
            kn[..., keys, :],
            vn[..., keys, :],
            causal=masked,
            scale=factor,
            state=(out[..., rows, :], lse[..., rows]),
            return_lse=True,
        )
    return out, lse


def shard_attention_backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    delta: Array,
    lse: Array,
    q_rows: Rows,
    k_rows: Rows,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Gradients by one shard of queries and one shard of keys, of the part of attention that is between them.

    With `P = exp(s - lse)` and `dS = P * (d_out v^T - delta)`: `dq = scale dS k`, `dk = scale dS^T q`,
    `dv = P^T d_out`. Their sums over all pairs of shards are the gradients.

    Args:
        d_out: gradient of the output, `[B, Hq, n, Dv]` or `[Hq, n, Dv]`; float32, float16 or bfloat16.
        q: queries of a shard, as in `shard_attention`.
        k: keys of a shard.
        v: values of a shard.
        delta: `sum(d_out * out)` of each query, floating `[B, Hq, n]` or `[Hq, n]`.
        lse: log-sum-exp of each query over all keys, likewise.
        q_rows: positions of the queries.
        k_rows: positions of the keys.
        causal: as in the forward call.
        scale: as in the forward call.

    Returns:
        `(dq, dk, dv)`, float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or rows that do not fit.

    Cost:
        That of `longattn.dense.attention_backward` over the pairs that are visible.
    """
    qn, kn, vn = (np.asarray(x, np.float32) for x in dense_inputs(q, k, v, double=False))
    factor, causal = scale_factor(scale, qn.shape[-1]), flag(causal, "causal")
    _check_rows(q_rows, "q_rows", qn.shape[-2])
    _check_rows(k_rows, "k_rows", kn.shape[-2])
    given = as_numpy(d_out, "d_out")
    check_floating(given, "d_out")
    shape = (*qn.shape[:-1], vn.shape[-1])
    if given.shape != shape:
        raise ValueError(f"d_out: got shape {given.shape}, expected {shape}")
    d_wide = np.asarray(given, np.float32)
    sums = []
    for x, name in ((delta, "delta"), (lse, "lse")):
        found = as_numpy(x, name)
        check_floating(found, name)
        if found.shape != shape[:-1]:
            raise ValueError(f"{name}: got shape {found.shape}, expected {shape[:-1]}")
        sums.append(np.asarray(found, np.float32))
    dq, dk, dv = np.zeros(qn.shape, np.float32), np.zeros(kn.shape, np.float32), np.zeros(vn.shape, np.float32)
    for rows, keys, masked in _visible_parts(q_rows, k_rows, causal):
        part = d_wide[..., rows, :]
        # `delta` stands in for the output: that of zeros less a gradient of the lse.
        gradients = attention_backward(
            part, qn[..., rows, :], kn[..., keys, :], vn[..., keys, :], np.zeros_like(part), sums[1][..., rows],
            d_lse=-sums[0][..., rows], causal=masked, scale=factor,
        )  # fmt: skip
        dq[..., rows, :] += gradients[0]
        dk[..., keys, :] += gradients[1]
        dv[..., keys, :] += gradients[2]
    return dq, dk, dv


def burst_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    workers: int = 4,
    layout: Layout = "zigzag",
    causal: bool = False,
    scale: float | None = None,
    nodes: int = 1,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Any:
    """Exact self-attention of a sequence that is cut over a ring of workers, which are threads here.

    Each worker keeps its queries and passes its shard of keys and values on; in each of `workers` rounds it attends
    to the shard in hand, adds that to its running `(o, lse)`, and has sent the shard on before it computes, so that
    sending overlaps. Masks go by absolute positions, so layouts differ in balance only. The functions of one round,
    `shard_rows`, `shard_attention` and `shard_attention_backward`, are those that real workers would call.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, L, D]`, or `[Hkv, L, D]`; any of the three dtypes.
        v: values `[B, Hkv, L, Dv]`, or `[Hkv, L, Dv]`; dtype of `k`.
        workers: shards of the sequence.
        layout: which rows a worker holds, see `shard_rows`.
        causal: a query sees keys up to its own position only.
        scale: factor on the logits; `None` is `D ** -0.5`.
        nodes: workers are grouped in so many nodes, a divisor of `workers`: shards go around within a node, then on to
            the next node, so that all but one in `workers / nodes` rounds stay within.
        return_lse: also return the log-sum-exp of the logits.
        return_stats: also return what was sent.

    Returns:
        The output in the shape, kind and dtype of `q` (but for `Dv`); then, where asked for, lse, float32
        `[B, Hq, L]` (or `[Hq, L]`), and `BurstStats`, as a tuple. The same bits in every run.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        That of `longattn.attention` in all. Each worker sends `(workers - 1) * Hkv * n * (D + Dv)` numbers, `n` the
        rows of a shard, and holds float32 results of its shard and one shard of keys and values beside its own.

    References:
        A. Sun et al., "BurstAttention: An Efficient Distributed Attention Framework for Extremely Long Sequences",
        2024, arXiv:2403.09347.

    Example:
        >>> import numpy as np, longattn as la, longattn.distributed
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 100, 16), dtype=np.float32)
        >>> out = longattn.distributed.burst_attention(q, k, v, workers=3, causal=True)
        >>> bool(np.allclose(out, la.attention(q, k, v, causal=True), atol=1e-5))
        True
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    factor, causal = scale_factor(scale, qn.shape[-1]), flag(causal, "causal")
    return_lse, return_stats = flag(return_lse, "return_lse"), flag(return_stats, "return_stats")
    rows, ring = _sharded(qn, kn, workers, layout, nodes)
    exchange = Exchange(ring.workers)
    shards = [[_shard(x, mine) for x in (qn, kn, vn)] for mine in rows]

    def work(me: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        own = shards[me][0]
        origin, (_, keys, values), state = me, shards[me], None
        for n in range(ring.workers):
            if n + 1 < ring.workers:
                exchange.send(me, ring.next(me, n), n, (origin, keys, values))
            state = shard_attention(own, keys, values, rows[me], rows[origin], causal=causal, scale=factor, state=state)
            if n + 1 < ring.workers:
                origin, keys, values = exchange.receive(me, n)
        assert state is not None
        return state

    out = np.empty((*qn.shape[:-1], vn.shape[-1]), qn.dtype)
    lse = np.empty(qn.shape[:-1], np.float32)
    for mine, (o, sums) in zip(rows, run_workers(exchange, work), strict=True):
        _put_back(out, mine, o)
        _put_back(lse[..., None], mine, sums[..., None])
    found: tuple[Any, ...] = (like(q, out),)
    if return_lse:
        found += (like(q, lse),)
    if return_stats:
        found += (BurstStats(exchange.sent, ring.workers, "keys"),)
    return found if len(found) > 1 else found[0]


def burst_attention_backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    workers: int = 4,
    layout: Layout = "zigzag",
    causal: bool = False,
    scale: float | None = None,
    nodes: int = 1,
    travel: Travel | None = None,
    return_stats: bool = False,
) -> Any:
    """Gradients of `burst_attention` by queries, keys and values, over the same ring.

    With `travel="queries"`, as in the paper, a shard's queries, output gradients, `delta = sum(d_out * out)` and lse
    go around, with the queries' gradients, which grow on their way and return home; gradients of keys and values stay
    put. With `travel="keys"`, keys and values go around with their gradients.

    Args:
        d_out: gradient of the output, shape and dtype of `out`.
        q: queries, as in the forward call.
        k: keys, as in the forward call.
        v: values, as in the forward call.
        out: the forward call's output.
        lse: the forward call's log-sum-exp, floating `[B, Hq, L]` (or `[Hq, L]`).
        workers: as in `burst_attention`.
        layout: as in `burst_attention`.
        causal: as in the forward call.
        scale: as in the forward call.
        nodes: as in `burst_attention`.
        travel: what goes around; `None` is whichever is fewer bytes (keys, where many query heads share a KV head).
        return_stats: also return what was sent.

    Returns:
        `(dq, dk, dv)` in the shapes and dtypes of `q`, `k` and `v` and the kind of `q`; with `return_stats` and
        `BurstStats` behind them.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        That of `longattn.dense.attention_backward` in all. Each worker sends, in numbers, `(workers - 1) * n` times
        `Hq * (2 * D + Dv + 2)` for queries and `2 * Hkv * (D + Dv)` for keys. Gradients travel as float32.
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    factor, causal = scale_factor(scale, qn.shape[-1]), flag(causal, "causal")
    return_stats = flag(return_stats, "return_stats")
    shape = (*qn.shape[:-1], vn.shape[-1])
    outputs = []
    for x, name in ((out, "out"), (d_out, "d_out")):
        found = as_numpy(x, name)
        if found.dtype != qn.dtype:
            raise TypeError(f"{name}: got dtype {found.dtype}, expected {qn.dtype} as q")
        if found.shape != shape:
            raise ValueError(f"{name}: got shape {found.shape}, expected {shape}")
        outputs.append(found)
    sums = as_numpy(lse, "lse")
    check_floating(sums, "lse")
    if sums.shape != shape[:-1]:
        raise ValueError(f"lse: got shape {sums.shape}, expected {shape[:-1]}")
    one_of(travel, "travel", (*get_args(Travel), None))
    rows, ring = _sharded(qn, kn, workers, layout, nodes)
    if travel is None:
        travel = _fewer_bytes(qn, kn, vn)
    exchange = Exchange(ring.workers)
    queries, keys = [], []
    for mine in rows:
        d, o, s = _shard(outputs[1], mine), _shard(outputs[0], mine), _shard(sums[..., None], mine)[..., 0]
        delta = np.einsum("...d,...d->...", np.asarray(d, np.float32), np.asarray(o, np.float32))
        queries.append((_shard(qn, mine), d, delta, np.asarray(s, np.float32)))
        keys.append((_shard(kn, mine), _shard(vn, mine)))
    moving: list[tuple[NDArray[Any], ...]] = list(queries) if travel == "queries" else list(keys)

    def between(query_shard: int, key_shard: int) -> tuple[_Gradients, _Gradients]:
        q_part, d, delta, s = queries[query_shard]
        k_part, v_part = keys[key_shard]
        dq, dk, dv = shard_attention_backward(
            d, q_part, k_part, v_part, delta, s, rows[query_shard], rows[key_shard], causal=causal, scale=factor
        )
        return ((dq,), (dk, dv)) if travel == "queries" else ((dk, dv), (dq,))

    def work(me: int) -> tuple[_Gradients, _Gradients]:
        origin = me
        grown: _Gradients | None = None  # of what is in hand
        home: _Gradients = ()  # of what this worker sent out
        still: _Gradients = ()  # of what stays
        for n in range(ring.workers):
            if n + 1 < ring.workers:
                exchange.send(me, ring.next(me, n), ("rows", n), (origin, *moving[origin]))
            pair = (origin, me) if travel == "queries" else (me, origin)
            travelling, staying = between(*pair)
            still = staying if n == 0 else _added(still, staying)
            if n == 0:
                home = travelling
            else:
                grown = travelling if grown is None else _added(grown, travelling)
            if n + 1 < ring.workers:
                if n:
                    exchange.send(me, ring.next(me, n), ("gradients", n), grown)
                origin = exchange.receive(me, ("rows", n))[0]
                grown = exchange.receive(me, ("gradients", n)) if n else None
        if ring.workers > 1:
            exchange.send(me, origin, "home", grown)
            home = _added(home, exchange.receive(me, "home"))
        return (home, still) if travel == "queries" else (still, home)

    gradients = tuple(np.empty(x.shape, x.dtype) for x in (qn, kn, vn))
    for mine, (of_queries, of_keys) in zip(rows, run_workers(exchange, work), strict=True):
        for whole, part in zip(gradients, (*of_queries, *of_keys), strict=True):
            _put_back(whole, mine, part)
    result: tuple[Any, ...] = tuple(like(q, x) for x in gradients)
    return (*result, BurstStats(exchange.sent, ring.workers, travel)) if return_stats else result


@dataclass(frozen=True, slots=True)
class _Ring:
    """A ring within each node, and a ring of nodes."""

    workers: int
    nodes: int

    def next(self, worker: int, round_number: int) -> int:
        """Who gets what this worker has in a round."""
        of_node = self.workers // self.nodes
        node, place = divmod(worker, of_node)
        if (round_number + 1) % of_node == 0:
            return (node + 1) % self.nodes * of_node + place
        return node * of_node + (place + 1) % of_node


def _sharded(
    q: NDArray[Any], k: NDArray[Any], workers: object, layout: Any, nodes: object
) -> tuple[list[tuple[range, ...]], _Ring]:
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(f"k: got length {k.shape[-2]}, expected {q.shape[-2]} as in q")
    count, groups = integer(workers, "workers", 1), integer(nodes, "nodes", 1)
    if count % groups:
        raise ValueError(f"nodes: got {groups}, expected a divisor of the {count} workers")
    return shard_rows(q.shape[-2], count, layout), _Ring(count, groups)


def _fewer_bytes(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> Travel:
    """What is cheaper to send around, per row."""
    dim, wide = q.shape[-1], v.shape[-1]
    of_queries = q.shape[-3] * (q.itemsize * (dim + wide) + 4 * (dim + 2))
    of_keys = k.shape[-3] * (k.itemsize + 4) * (dim + wide)
    return "queries" if of_queries <= of_keys else "keys"


def _check_rows(rows: Rows, name: str, length: int) -> None:
    if not isinstance(rows, Sequence) or not all(isinstance(run, range) for run in rows):
        raise TypeError(f"{name}: got {rows!r}, expected a sequence of ranges")
    if sum(map(len, rows)) != length:
        raise ValueError(f"{name}: got {sum(map(len, rows))} positions, expected {length}")
    if any(run.step < 1 for run in rows):
        raise ValueError(f"{name}: got {rows!r}, expected ranges that rise")


def _visible_parts(q_rows: Rows, k_rows: Rows, causal: bool) -> list[tuple[slice, slice, bool]]:
    """Rows of queries, rows of keys and whether they are masked: each visible pair in exactly one part.

    In ranges of one step, query `i` sees key `j` where `j <= i + shift`. Masked parts end with a query that sees
    their last key and no later one, which is how `longattn.attention` aligns them.
    """
    parts = []
    first_query = 0
    for query_run in q_rows:
        first_key = 0
        for key_run in k_rows:
            queries, keys = len(query_run), len(key_run)
            if not (queries and keys):
                continue
            if causal and query_run.step != key_run.step:
                raise ValueError(f"k_rows: got step {key_run.step}, expected {query_run.step} as in q_rows")
            shift = (query_run.start - key_run.start) // query_run.step if causal else keys - 1
            begin = max(0, -shift)
            split = begin if shift >= keys - 1 else max(begin, min(queries, keys - shift))
            at = first_query, first_key
            if begin < split:
                seen = slice(at[1], at[1] + split + shift)
                parts.append((slice(at[0] + begin, at[0] + split), seen, True))
            if split < queries:
                parts.append((slice(at[0] + split, at[0] + queries), slice(at[1], at[1] + keys), False))
            first_key += keys
        first_query += len(query_run)
    return parts


def _shard(x: NDArray[Any], rows: Rows) -> NDArray[Any]:
    """Rows of a shard: a view where they are one range."""
    views = [x[..., run.start : run.stop : run.step, :] for run in rows]
    return views[0] if len(views) == 1 else np.concatenate(views, axis=-2)


def _put_back(whole: NDArray[Any], rows: Rows, part: NDArray[Any]) -> None:
    at = 0
    for run in rows:
        whole[..., run.start : run.stop : run.step, :] = part[..., at : at + len(run), :]
        at += len(run)


def _added(some: _Gradients, more: _Gradients) -> _Gradients:
    return tuple(x + y for x, y in zip(some, more, strict=True))


METHOD = Method(
    name="burst_attention",
    family="distributed",
    title="BurstAttention: An Efficient Distributed Attention Framework for Extremely Long Sequences",
    year=2024,
    arxiv="2403.09347",
    function=burst_attention,
    reference=reference.burst_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "The result depends on neither the number of workers nor the layout; one worker is attention.",
        "Gradients are those of attention.",
        "What a worker gets from each shard merges in one call to the same output and lse.",
        "A ring of nodes gives what one ring gives.",
    ),
    tests="tests/distributed/test_burst_attention.py",
    cost="That of attention in all; a worker sends `(workers - 1) * Hkv * n * (D + Dv)` numbers, and in the backward "
    "pass `(workers - 1) * n` times the smaller of `Hq * (2 * D + Dv + 2)` and `2 * Hkv * (D + Dv)`.",
)
