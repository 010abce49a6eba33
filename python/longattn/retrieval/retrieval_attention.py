"""Retrieval attention: each decode step reads the rows of a store that matter and estimates the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import FLOATS, Array, as_numpy, like
from longattn._checks import finite, flag, items_of, one_of
from longattn.index import Index
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference.retrieval import retrieval_attention as reference
from longattn.retrieval import _budgets

#: Statistics of `[Hkv, Lq]`.
_PER_KV_HEAD = ("keys_total", "keys_scored", "keys_attended", "keys_sampled", "index_bytes")
_SECONDS = ("scan_seconds", "weigh_seconds", "select_seconds")


@dataclass(frozen=True, slots=True)
class RetrievalStats:
    """What a call read, and what it may have missed.

    Attributes:
        keys_total: `[Hkv, Lq]`, rows that each query saw.
        keys_scored: `[Hkv, Lq]`, rows, or units of several rows, that the index scored.
        keys_attended: `[Hkv, Lq]`, rows whose keys and values were read.
        keys_sampled: `[Hkv, Lq]`, rows of the sample, with those that were certain of a place in it; 0 where all
            rows were read instead, or nothing is sampled.
        index_bytes: `[Hkv, Lq]`, bytes of the index that were read.
        scan_seconds: float32 `[Hkv, Lq]`, time of the thread that scanned all codes (or keys); 0 where nothing
            was scanned, and for samples. Where all scores are kept (few candidates, large `top_k`, `top_p`) it
            has summed them, too.
        weigh_seconds: float32 `[Hkv, Lq]`, likewise, of turning the scores into shares of the mass. Where scores
            are not kept both are told from every eighth tile of keys.
        select_seconds: float32 `[Hkv, Lq]`, likewise, of selecting rows by these shares.
        missed_mass: float32 `[Hq, Lq]`, estimated share of the softmax mass outside the rows that were read. With
            `rest="values"` that mass is in the result, as an estimate; with `rest="none"` it is left out.
        missed_mass_bound: float32 `[Hq, Lq]`, upper bound of the true share. For `Signatures` it holds if no logit
            is underestimated by more than 5.5 standard deviations of its code's error: loose with 4 bits (0.9 and
            more on heads that spread their mass), close to 1 with fewer. 1 where an index gives no bound.
        selected: rows picked through the index or sampled, ascending, `[Hkv][Lq]` lists of uint32 arrays; empty
            lists unless `return_selected` was set.
        error_estimate: float32 `[Hq, Lq]`, expected norm (root mean square) of the output's error, relative to the
            norm of the output, or with `relative_to="values"` to the root mean square norm of the head's values; 0
            where all rows were read, NaN where rows were left out and nothing was sampled.
        verified: bool `[Hq, Lq]`, whether a sample met `epsilon` and `delta`. Where it did not, all rows were read
            and the output is exact, as `keys_attended` shows.
    """

    keys_total: NDArray[np.int64]
    keys_scored: NDArray[np.int64]
    keys_attended: NDArray[np.int64]
    keys_sampled: NDArray[np.int64]
    index_bytes: NDArray[np.int64]
    scan_seconds: NDArray[np.float32]
    weigh_seconds: NDArray[np.float32]
    select_seconds: NDArray[np.float32]
    missed_mass: NDArray[np.float32]
    missed_mass_bound: NDArray[np.float32]
    selected: list[list[NDArray[np.uint32]]]
    error_estimate: NDArray[np.float32]
    verified: NDArray[np.bool_]

    @property
    def fraction_attended(self) -> float:
        """Rows read over rows seen, all heads and queries together."""
        return float(self.keys_attended.sum() / max(1, self.keys_total.sum()))


class RetrievalResult:
    """Output of `retrieval_attention`.

    Attributes:
        out: `[Hq, Lq, Dv]` (with a leading 1 if `q` had one), kind and dtype of `q`.
        lse: float32 `[Hq, Lq]` (likewise), natural log of the denominator: the rows read, the estimate of the
            rest, and the sink logit. Use it with `merge`.
    """

    __slots__ = ("_stats", "lse", "out")

    def __init__(self, out: Array, lse: Array, stats: Callable[[], RetrievalStats] | RetrievalStats | None) -> None:
        self.out, self.lse, self._stats = out, lse, stats

    @property
    def stats(self) -> RetrievalStats | None:
        """What was read and missed; `None` with `return_stats=False`. Made when it is first asked for."""
        if callable(self._stats):
            self._stats = self._stats()
        return self._stats

    def __repr__(self) -> str:
        """Output, log-sum-exp and statistics."""
        return f"RetrievalResult(out={self.out!r}, lse={self.lse!r}, stats={self.stats!r})"


def retrieval_attention(
    q: Array,
    store: KVStore,
    index: Index,
    *,
    top_k: int | Sequence[int] | None = None,
    top_p: float | None = None,
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
    rest: Literal["values", "none", "sampled"] | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    relative_to: Literal["output", "values"] | None = None,
    seed: int = 0,
    sink_logits: Array | None = None,
    return_stats: bool = True,
    return_selected: bool = False,
) -> RetrievalResult:
    """Causal attention of the newest queries over a store, reading few of its rows.

    The first `sinks` and the last `window` rows are read exactly. The index picks among the rows between them, once
    per KV head for its whole query group; those are then read exactly, where they lie. All other rows enter as the
    index estimates them, so that flat heads come out right too: on those the rows that a budget can afford hold
    only a small part of the mass.

    `Signatures` scan the codes of all rows and pick those of most estimated weight (the mean over the group's heads
    of each row's share of the softmax); a row left unread has its code's weight times the mean value of its value
    cluster.

    `Flat`, `Graph` and `InvertedLists` score keys themselves, all of them or those that a search or the nearest
    centroids lead to, and leave the rest out.

    Query row `i` sits at position `len(store) - Lq + i` and sees the rows up to its own: append a step's keys and
    values before attending. With several rows, `rest="values"` uses cluster means of all rows of the store, so the
    result equals one call per row only approximately; the rows selected are the same.

    Args:
        q: queries `[Hq, Lq, D]` or `[1, Hq, Lq, D]`; float32, float16 or bfloat16; at most 64 query heads per KV
            head.
        store: keys and values; at least `Lq` rows.
        index: an index of that store. Brought up to date first.
        top_k: rows to select per KV head, beside sinks and window: one number, or one for each KV head
            (`probe_budgets` finds some). `None` without `top_p` is 1 % of the rows, at least 64.
        top_p: instead of `top_k`: the fewest rows that, with sinks and window, hold this share of every head's
            mass, as the index estimates it. Sensible with 4 bits; on flat heads it reads much of the store.
        sinks: first rows that are always read.
        window: last rows that are always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        rest: what becomes of the rows not read: `"values"` estimates them, `"none"` leaves them out. `None` is
            `"values"` for an index that estimates them, else `"none"`. With `"sampled"` half of `top_k` are the rows
            of most weight and as many are drawn at random from the others (fewer, where some are certain to be
            drawn). They correct the estimate, as far as the correction exceeds its own noise: half the error on flat
            heads of real models, where the estimate is biased; up to a quarter more where it is not. Where the
            estimate's logits err by more than 16 nats, all rows are read instead.
        epsilon: instead of a budget of rows: reads a sample of rows, and more of them until the norm of the output's
            error is at most `epsilon` times that of `relative_to`, or else all rows. See `verified_sparse_attention`.
        delta: chance that the error is larger; `None` is 0.05. A promise for each query head and position.
        relative_to: `"output"` (the default): the norm of the exact output. `"values"`: the root mean square norm of
            the head's values, which takes fewer rows on flat heads, whose outputs are small.
        seed: of the random numbers of samples, 0 to 2**64 - 1. A row's number depends on the seed, the position, the
            KV head and the row alone: the same call gives the same result, on any number of threads.
        sink_logits: floating `[Hq]`: an extra logit per head that takes part in the denominator only.
        return_stats: return what was read and missed.
        return_selected: also list the selected rows in the statistics.

    Returns:
        A `RetrievalResult`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit the store, an index of another store, budgets out of range, or a store
            with fewer rows than queries.

    Cost:
        `bits * D / 8 + 2` bytes per row and KV head for the scan, and the rows read. New rows are coded first, the
        first call codes them all.

    References:
        D. Liu et al., "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval", 2024,
        for the split into steady rows and rows retrieved from host memory. The codes are those of `Signatures`.
    """
    options = _Options(
        top_k=top_k,
        top_p=top_p,
        sinks=sinks,
        window=window,
        scale=scale,
        rest=rest,
        epsilon=epsilon,
        delta=delta,
        relative_to=relative_to,
        seed=seed,
        sink_logits=sink_logits,
        return_stats=return_stats,
        return_selected=return_selected,
    )
    return _run([_Call(q, store, index, options)], options)[0]


def retrieval_attention_batch(
    qs: Sequence[Array], stores: Sequence[KVStore], indexes: Sequence[Index], **options: Any
) -> list[RetrievalResult]:
    """`retrieval_attention` of several sequences in one call, whatever their lengths.

    The KV heads of all sequences are one pool of work for the threads: a batch of short sequences keeps them as busy
    as one long sequence. The results are the same bits as those of one call for each.

    Args:
        qs: queries of each sequence, as `retrieval_attention` takes them; an array `[B, Hq, Lq, D]` will do.
        stores: a store for each; no store twice.
        indexes: an index of each store.
        options: the options of `retrieval_attention`, the same for all; budgets that depend on the length are of each
            sequence.

    Returns:
        A `RetrievalResult` for each sequence.

    Raises:
        TypeError: an argument of another kind or dtype; an unknown option.
        ValueError: what `retrieval_attention` refuses, with the number of the sequence; lists of different lengths;
            a store twice; sequences whose heads differ.

    Cost:
        That of a call for each sequence.
    """
    qs, stores = items_of(qs, "qs", "arrays"), items_of(stores, "stores", "stores")
    indexes = items_of(indexes, "indexes", "indexes")
    if not len(qs) == len(stores) == len(indexes):
        raise ValueError(
            f"stores, indexes: got {len(stores)} and {len(indexes)} for {len(qs)} queries, expected one for each"
        )
    if len({id(store) for store in stores}) < len(stores):
        raise ValueError("stores: got a store twice, expected a store of its own for each sequence")
    for name in options:
        if name not in _Options.__dataclass_fields__:
            raise TypeError(f"{name}: got an option that retrieval_attention does not have")
    given = _Options(**options)
    calls = []
    for i, (q, store, index) in enumerate(zip(qs, stores, indexes, strict=True)):
        try:
            calls.append(_Call(q, store, index, given))
        except (TypeError, ValueError) as error:
            raise type(error)(f"sequence {i}: {error}") from None
        if calls[i].q.shape[::2] != calls[0].q.shape[::2]:
            raise ValueError(f"qs: got heads of shapes {calls[0].q.shape} and {calls[i].q.shape}, expected the same")
    return _run(calls, given) if calls else []


@dataclass(frozen=True, slots=True)
class _Options:
    """What callers ask of every sequence."""

    top_k: int | Sequence[int] | None = None
    top_p: float | None = None
    sinks: int = 4
    window: int = 512
    scale: float | None = None
    rest: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    relative_to: str | None = None
    seed: int = 0
    sink_logits: Array | None = None
    return_stats: bool = True
    return_selected: bool = False


class _Call:
    """One sequence, checked."""

    def __init__(self, q: Array, store: KVStore, index: Index, options: _Options) -> None:
        if not isinstance(store, KVStore):
            raise TypeError(f"store: got {type(store).__name__}, expected a KVStore")
        if not isinstance(index, Index):
            raise TypeError(f"index: got {type(index).__name__}, expected an Index")
        if index.store is not store:
            raise ValueError("index: got the index of another store, expected one built on `store`")
        qn = as_numpy(q, "q")
        if qn.dtype not in FLOATS:
            raise TypeError(f"q: got dtype {qn.dtype}, expected float32, float16 or bfloat16")
        if qn.ndim not in (3, 4) or (qn.ndim == 4 and qn.shape[0] != 1):
            raise ValueError(f"q: got shape {qn.shape}, expected [Hq, Lq, D] or [1, Hq, Lq, D]")
        self.q = qn[0] if qn.ndim == 4 else qn
        self.heads, self.rows, dim = self.q.shape
        self.kv_heads = store.kv_heads
        if self.heads == 0 or self.heads % self.kv_heads or dim != store.head_dim:
            raise ValueError(
                f"q: got {self.heads} heads of width {dim}, expected a positive multiple of the {self.kv_heads} heads "
                f"of the store, of width {store.head_dim}"
            )
        if len(store) == 0:
            raise ValueError("store: got an empty store, expected at least one row")
        if self.rows > len(store):
            raise ValueError(f"q: got {self.rows} queries, expected at most the {len(store)} rows of the store")
        rest = one_of(options.rest, "rest", _budgets.RESTS)
        top_k, top_p = options.top_k, options.top_p
        weighs_none = None if index.weighs_rows else type(index).__name__
        self.sampling = _budgets.sampling(
            weighs_none, options.seed, rest, options.epsilon, options.delta, options.relative_to, top_k, top_p
        )
        self.top_k, self.top_p = _budgets.rows_or_mass(top_k, top_p, len(store), self.kv_heads)
        self.sinks, self.window = _budgets.count(options.sinks, "sinks"), _budgets.count(options.window, "window")
        self.factor = dim**-0.5 if options.scale is None else finite(options.scale, "scale")
        self.estimate = index.estimates if rest is None else rest == "values"
        self.logits = None
        if options.sink_logits is not None:
            self.logits = np.ascontiguousarray(as_numpy(options.sink_logits, "sink_logits"), np.float32)
            if self.logits.shape != (self.heads,):
                raise ValueError(f"sink_logits: got shape {self.logits.shape}, expected ({self.heads},)")
        self.given, self.index, self.batch = q, index, qn.shape[:-3]
        self.out = np.empty((self.heads, self.rows, store.value_dim), qn.dtype)
        self.lse = np.empty((self.heads, self.rows), np.float32)

    def result(self, found: dict[str, list[Any]], options: _Options) -> RetrievalResult:
        """What the core found, as callers get it."""
        shape, listed = (self.heads, self.kv_heads, self.rows), options.return_selected
        stats = partial(_stats, found, shape, listed) if options.return_stats else None
        out, lse = self.out, self.lse
        if self.batch:
            out, lse = out[None], lse[None]
        return RetrievalResult(like(self.given, out), like(self.given, lse), stats)


def _stats(found: dict[str, list[Any]], shape: tuple[int, int, int], listed: bool) -> RetrievalStats:
    """Statistics of a call of so many query heads, KV heads and rows."""
    heads, kv_heads, rows = shape
    per_kv_head: dict[str, NDArray[Any]] = {
        name: np.asarray(found[name], kind).reshape(kv_heads, rows)
        for names, kind in ((_PER_KV_HEAD, np.int64), (_SECONDS, np.float32))
        for name in names
    }

    def per_query_head(name: str) -> NDArray[np.float32]:
        by_group = np.asarray(found[name], np.float32).reshape(kv_heads, rows, heads // kv_heads)
        return np.ascontiguousarray(by_group.transpose(0, 2, 1)).reshape(heads, rows)

    lists = [np.asarray(picked, np.uint32) for picked in found["selected"]] if listed else []
    return RetrievalStats(
        **per_kv_head,
        missed_mass=per_query_head("missed_mass"),
        missed_mass_bound=per_query_head("missed_mass_bound"),
        selected=[lists[h * rows : (h + 1) * rows] for h in range(kv_heads)],
        error_estimate=per_query_head("error_estimate"),
        verified=np.asarray(found["verified"], bool).reshape(kv_heads, rows).repeat(heads // kv_heads, axis=0),
    )


def _run(calls: list[_Call], options: _Options) -> list[RetrievalResult]:
    first, listed = calls[0], flag(options.return_selected, "return_selected")
    flag(options.return_stats, "return_stats")
    found = _core.retrieval_attention(
        [(call.q, call.index._handle, call.out, call.lse, call.top_k, call.estimate) for call in calls],
        0.0 if first.top_p is None else first.top_p,
        first.sinks,
        first.window,
        first.factor,
        first.logits,
        listed,
        first.sampling,
    )
    return [call.result(of_call, options) for call, of_call in zip(calls, found, strict=True)]


METHOD = Method(
    name="retrieval_attention",
    family="retrieval",
    title="RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval",
    year=2024,
    arxiv="2409.10516",
    function=retrieval_attention,
    reference=reference.attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A budget of every row is causal attention.",
        "Over the rows that were read the result is their softmax.",
        "Several queries select and read what a step for each does.",
        "`lse` is what `merge` needs: two halves of the keys make the whole.",
        "A graph that is searched for every row reads what the exact scan reads.",
    ),
    tests="tests/retrieval/test_retrieval.py",
    cost="What the index reads (`bits * D / 8 + 2` bytes per row and KV head for codes), and the rows that are read.",
)
