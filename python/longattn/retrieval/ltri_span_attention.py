"""Attention over a stream: sinks, a window, and spans of text that are found in attention maps and retrieved."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_floating, dense_inputs, flag, integer, one_of, real, scale_factor, storage
from longattn._rotary import turned
from longattn.dense.attention_varlen import attention_varlen
from longattn.dense.attention_weights import attention_weights
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference import retrieval as reference
from longattn.retrieval.span_discovery import checked_spans, discover_spans, span_representatives

GroupReduce = Literal["sum", "max"]
RowReduce = Literal["mean", "max"]
Positions = Literal["true", "cache"]
Spans = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SpanStats:
    """What a call read, per KV head and block of queries.

    Attributes:
        keys_total: int64 `[blocks]`: rows up to the block's last query.
        keys_scored: int64 `[blocks]`: representatives scored.
        keys_attended: int64 `[Hkv, blocks]`: rows read.
        spans: `[Hkv][blocks]` arrays of the numbers of the spans retrieved, ascending.
    """

    keys_total: NDArray[np.int64]
    keys_scored: NDArray[np.int64]
    keys_attended: NDArray[np.int64]
    spans: list[list[NDArray[np.int64]]]


@dataclass(frozen=True, slots=True)
class _Rule:
    sinks: int
    window: int
    budget: int
    block: int
    group_reduce: GroupReduce
    row_reduce: RowReduce
    scale: float


def ltri_span_attention(
    q: Array,
    k: Array,
    v: Array,
    spans: Array,
    representatives: Array,
    *,
    sinks: int = 4,
    window: int = 512,
    budget: int = 1024,
    block: int = 1,
    group_reduce: GroupReduce = "max",
    row_reduce: RowReduce = "max",
    scale: float | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Any:
    """Causal attention of the newest queries to the first rows, the last rows, and spans retrieved from between.

    A span's score for a KV head is the largest dot product of any query with any of its representatives. Spans are
    taken by score, the earlier of equals, those that do not fit into what is left of the budget being passed over; the
    softmax is over sinks, spans taken and window, at their true positions. A span that reaches into the sinks or the
    window counts without that part, and rows that no span holds yet belong to the window.

    Args:
        q: queries `[Hq, Lq, D]` of the last `Lq` rows; float32, float16 or bfloat16.
        k: keys `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[Hkv, Lk, Dv]`; dtype of `k`.
        spans: integers `[m, 2]`, first row and the one after the last, each beginning where the one before ends, the
            first at 0; see `discover_spans`.
        representatives: rows that stand for each span, integers `[m, n_rep]`; see `span_representatives`.
        sinks: first rows that are always read.
        window: last rows that each query reads at least.
        budget: most rows of spans per KV head.
        block: queries in a row that share their spans.
        group_reduce: the score of a KV head is the largest (`"max"`) of its query heads', or their sum.
        row_reduce: the score of a head is the largest of the block's queries' (`"max"`), or their mean.
        scale: factor on the logits; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp of the logits.
        return_stats: also return what was read.

    Returns:
        The output `[Hq, Lq, Dv]` in the kind and dtype of `q`; then, where asked for, lse, float32 `[Hq, Lq]`, and
        `SpanStats`, as a tuple.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Per block of queries, `Hq * block * m * n_rep * D` multiply-adds to score, attention over
        `sinks + budget + window + block` rows per KV head, and a copy of those.

    References:
        H. Tang et al., "Ltri-LLM: Streaming Long Context Inference for LLMs with Training-Free Dynamic Triangular
        Attention Pattern", 2024, arXiv:2412.04757.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 300, 16), dtype=np.float32)
        >>> spans = np.array([[0, 100], [100, 180], [180, 260]])
        >>> representatives = np.array([[5, 50], [110, 170], [190, 200]])
        >>> options = {"window": 32, "budget": 100}
        >>> la.retrieval.ltri_span_attention(q[:, -1:], k, v, spans, representatives, **options).shape
        (2, 1, 16)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    if qn.ndim != 3:
        raise ValueError(f"q: got shape {qn.shape}, expected [Hq, Lq, D]")
    if qn.shape[1] > kn.shape[1]:
        raise ValueError(f"q: got {qn.shape[1]} queries, expected at most the {kn.shape[1]} keys")
    rule = _rule(sinks, window, budget, block, group_reduce, row_reduce, scale, qn.shape[2])
    return_lse, return_stats = flag(return_lse, "return_lse"), flag(return_stats, "return_stats")
    bounds = checked_spans(spans, kn.shape[1])
    stand_ins = _checked_rows(representatives, bounds)
    vectors = np.asarray(kn[:, stand_ins], np.float32)  # [Hkv, m, n_rep, D]
    out, lse = np.empty((*qn.shape[:2], vn.shape[2]), qn.dtype), np.empty(qn.shape[:2], np.float32)
    taken = []
    for at in range(0, qn.shape[1], rule.block):
        rows = slice(at, min(at + rule.block, qn.shape[1]))
        scores = _span_scores(np.asarray(qn[:, rows], np.float32), vectors, rule)
        end = kn.shape[1] - qn.shape[1] + rows.stop
        picked = _taken(scores, bounds, end, rows.stop - rows.start, rule)
        out[:, rows], lse[:, rows] = _attend(qn[:, rows], kn, vn, picked, rule, None)
        taken.append((end, picked))
    found: tuple[Any, ...] = (like(q, out),)
    if return_lse:
        found += (like(q, lse),)
    if return_stats:
        found += (_stats(taken, bounds, stand_ins.size),)
    return found if len(found) > 1 else found[0]


class LtriCache:
    """A stream of tokens with `ltri_span_attention`: rows in a `KVStore`, spans found segment by segment.

    Once `segment` tokens are complete, their attention to each other (the mean over all query heads), which the queries
    given to `append` make, is searched for spans.

    Args:
        kv_heads: heads of keys and values.
        head_dim: width of a key.
        value_dim: width of a value; `None` is `head_dim`.
        dtype: storage dtype: float32, float16 or bfloat16.
        segment: tokens that are searched for spans together.
        min_len: see `discover_spans`.
        max_len: see `discover_spans`.
        theta: see `triangle_scores`.
        iou: see `discover_spans`.
        n_rep: see `span_representatives`.
        sinks: see `ltri_span_attention`.
        window: see `ltri_span_attention`.
        budget: see `ltri_span_attention`.
        group_reduce: see `ltri_span_attention`.
        row_reduce: see `ltri_span_attention`.
        scale: see `ltri_span_attention`.
        positions: `"true"`: queries and keys come with their positions in them. `"cache"`: they come without, and rows
            that are read get the positions 0, 1, ... of the order they are read in, by `rope_base`; spans are ranked by
            products without positions.
        rope_base: base of rotary positions for `"cache"`, pairs being dimensions `d` and `d + D / 2`.
        persist: a span's score is the largest of this and so many calls of `attend` before: what was found stays a
            candidate. (The paper does not say how such candidates are weighed.)
        capacity: most rows.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: DTypeLike = "bfloat16",
        segment: int = 512,
        min_len: int = 4,
        max_len: int = 128,
        theta: float | None = None,
        iou: float = 0.3,
        n_rep: int = 4,
        sinks: int = 4,
        window: int = 512,
        budget: int = 1024,
        group_reduce: GroupReduce = "max",
        row_reduce: RowReduce = "max",
        scale: float | None = None,
        positions: Positions = "true",
        rope_base: float | None = None,
        persist: int = 0,
        capacity: int = 1 << 20,
    ) -> None:
        heads, dim = integer(kv_heads, "kv_heads", 1), integer(head_dim, "head_dim", 1)
        wide = dim if value_dim is None else integer(value_dim, "value_dim", 1)
        self._rule = _rule(sinks, window, budget, 1, group_reduce, row_reduce, scale, dim)
        self._segment, self._n_rep = integer(segment, "segment", 1), integer(n_rep, "n_rep", 1)
        self._discovery: dict[str, Any] = {"min_len": min_len, "max_len": max_len, "theta": theta, "iou": iou}
        discover_spans(np.zeros((0, 0)), **self._discovery)  # refuses what does not fit
        one_of(positions, "positions", get_args(Positions))
        self._rope = None if rope_base is None else real(rope_base, "rope_base")
        if (positions == "cache") != (self._rope is not None):
            raise ValueError(f"rope_base: got {rope_base} with positions={positions!r}, expected it with 'cache' only")
        if self._rope is not None and (not 0 < self._rope < np.inf or dim % 2):
            raise ValueError(
                f"rope_base: got {rope_base} for head_dim {dim}, expected a positive number and an even width"
            )
        self._store = KVStore(heads, dim, wide, storage(dtype), integer(capacity, "capacity", 1))
        self._pending: list[NDArray[Any]] = []  # queries of the unfinished segment
        self._spans = np.zeros((0, 2), np.int64)
        self._vectors = np.zeros((heads, 0, self._n_rep, dim), np.float32)
        self._before: deque[NDArray[np.float32]] = deque(maxlen=integer(persist, "persist", 0))

    def append(self, q: Array, k: Array, v: Array) -> None:
        """Appends tokens; searches the segments that they complete.

        Args:
            q: queries `[Hq, T, D]`; float32, float16 or bfloat16.
            k: keys `[Hkv, T, D]`; any of the three dtypes.
            v: values `[Hkv, T, Dv]`; dtype of `k`.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes that do not fit the cache, or more rows than its capacity leaves.
        """
        qn, kn, vn = dense_inputs(q, k, v, double=False)
        if qn.ndim != 3 or qn.shape[1] != kn.shape[1]:
            raise ValueError(f"q: got shape {qn.shape}, expected [Hq, {kn.shape[-2]}, D]")
        if self._pending and self._pending[0].shape[0] != qn.shape[0]:
            raise ValueError(f"q: got {qn.shape[0]} heads, expected {self._pending[0].shape[0]} as before")
        self._store.append(kn, vn)
        self._pending.append(np.asarray(qn, np.float32))
        while len(self._store) - self.indexed >= self._segment:
            waiting = np.concatenate(self._pending, axis=1)
            self._search(waiting[:, : self._segment])
            self._pending = [waiting[:, self._segment :]]

    def _search(self, q: NDArray[np.float32]) -> None:
        """Finds the spans of the next segment, whose queries are `q`."""
        start = self.indexed
        keys = self._store.keys[:, start : start + self._segment]
        group = q.shape[0] // keys.shape[0]
        mean = np.zeros((self._segment, self._segment))
        if self._rope is not None:
            places = np.arange(self._segment)
            q, keys = turned(q, places, self._rope), turned(np.asarray(keys, np.float32), places, self._rope)
        for head in range(keys.shape[0]):  # one matrix per query head at a time
            of_group = slice(head * group, (head + 1) * group)
            weights = attention_weights(
                q[of_group], keys[head : head + 1], range(self._segment), causal=True, scale=self._rule.scale
            )
            mean += np.asarray(weights).sum(axis=0, dtype=np.float64)
        mean /= q.shape[0]
        spans = discover_spans(mean, **self._discovery)
        rows = start + span_representatives(mean, spans, n_rep=self._n_rep)
        vectors = np.asarray(self._store.keys[:, rows], np.float32)
        self._spans = np.concatenate([self._spans, spans + start])
        self._vectors = np.concatenate([self._vectors, vectors], axis=1)

    def votes(self, q: Array, heads: Array | None = None) -> NDArray[np.float32]:
        """Scores that query heads give the spans, `[spans]`, for other layers whose spans are the same.

        Args:
            q: queries `[Hq, Lq, D]`.
            heads: query heads whose scores are added up, integers; `None` is all of them.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes or heads that do not fit.
        """
        qn = as_numpy(q, "q")
        check_floating(qn, "q")
        kv_heads, dim = self._store.kv_heads, self._store.head_dim
        if qn.ndim != 3 or qn.shape[0] % kv_heads or qn.shape[2] != dim:
            raise ValueError(f"q: got shape {qn.shape}, expected [a multiple of {kv_heads}, Lq, {dim}]")
        scores = _head_scores(np.asarray(qn, np.float32), self._vectors, self._rule)
        chosen = np.arange(len(scores)) if heads is None else as_numpy(heads, "heads")
        if chosen.dtype.kind not in "iu" or chosen.ndim != 1 or not np.isin(chosen, np.arange(len(scores))).all():
            raise ValueError(f"heads: got {chosen.tolist()}, expected numbers from 0 to {len(scores) - 1}")
        total: NDArray[np.float32] = scores[chosen].sum(axis=0)
        return total

    def attend(
        self, q: Array, *, votes: Array | None = None, return_lse: bool = False, return_stats: bool = False
    ) -> Any:
        """Attention of the newest rows' queries, which share their spans.

        Args:
            q: queries `[Hq, Lq, D]` of the last `Lq` rows; float32, float16 or bfloat16.
            votes: scores of the spans, floating `[spans]`, in place of the queries' own.
            return_lse: as in `ltri_span_attention`.
            return_stats: as in `ltri_span_attention`.

        Returns:
            As `ltri_span_attention`.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes that do not fit the cache.
        """
        qn, kn, vn = dense_inputs(q, self._store.keys, self._store.values, double=False)
        return_lse, return_stats = flag(return_lse, "return_lse"), flag(return_stats, "return_stats")
        end = kn.shape[1]
        if qn.shape[1] > end:
            raise ValueError(f"q: got {qn.shape[1]} queries, expected at most the {end} rows of the cache")
        if votes is None:
            scores = _span_scores(np.asarray(qn, np.float32), self._vectors, self._rule)
        else:
            given = as_numpy(votes, "votes")
            check_floating(given, "votes")
            if given.shape != (len(self._spans),):
                raise ValueError(f"votes: got shape {given.shape}, expected {(len(self._spans),)}")
            scores = np.broadcast_to(np.asarray(given, np.float32), (kn.shape[0], len(given)))
        best = scores.copy()
        for old in self._before:
            known = old.shape[1]
            best[:, :known] = np.maximum(best[:, :known], old)
        self._before.append(np.array(scores))
        picked = _taken(best, self._spans, end, qn.shape[1], self._rule)
        out, lse = _attend(qn, kn, vn, picked, self._rule, self._rope)
        found: tuple[Any, ...] = (like(q, out),)
        if return_lse:
            found += (like(q, lse),)
        if return_stats:
            found += (_stats([(end, picked)], self._spans, len(self._spans) * self._n_rep),)
        return found if len(found) > 1 else found[0]

    @property
    def spans(self) -> Spans:
        """Spans found so far, `[m, 2]`, which tile the first `indexed` rows."""
        return self._spans.copy()

    @property
    def indexed(self) -> int:
        """Rows that belong to spans."""
        return int(self._spans[-1, 1]) if len(self._spans) else 0

    @property
    def index_nbytes(self) -> int:
        """Bytes of spans and representatives."""
        return self._spans.nbytes + self._vectors.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of rows, spans and representatives."""
        return self._store.nbytes + self.index_nbytes

    def __len__(self) -> int:
        """Rows."""
        return len(self._store)


@dataclass(frozen=True, slots=True)
class _Taken:
    """What one KV head reads.

    Attributes:
        rows: ascending.
        spans: numbers of the spans among them, ascending.
    """

    rows: NDArray[np.int64]
    spans: NDArray[np.int64]


def _head_scores(q: NDArray[np.float32], vectors: NDArray[np.float32], rule: _Rule) -> NDArray[np.float32]:
    """Of query heads, `[Hq, m]`."""
    heads, rows, dim = q.shape
    kv_heads, spans, n_rep, _ = vectors.shape
    products = q.reshape(kv_heads, -1, dim) @ vectors.reshape(kv_heads, -1, dim).swapaxes(1, 2)
    best = products.reshape(heads, rows, spans, n_rep).max(axis=-1)
    found: NDArray[np.float32] = best.mean(axis=1) if rule.row_reduce == "mean" else best.max(axis=1)
    return found


def _span_scores(q: NDArray[np.float32], vectors: NDArray[np.float32], rule: _Rule) -> NDArray[np.float32]:
    """Of KV heads, `[Hkv, m]`."""
    heads, spans = vectors.shape[:2]
    of_heads = _head_scores(q, vectors, rule).reshape(heads, len(q) // heads, spans)
    found: NDArray[np.float32] = of_heads.sum(axis=1) if rule.group_reduce == "sum" else of_heads.max(axis=1)
    return found


def _taken(scores: NDArray[np.float32], spans: Spans, end: int, queries: int, rule: _Rule) -> list[_Taken]:
    """Rows that each KV head reads for the `queries` rows before `end`."""
    indexed = int(spans[-1, 1]) if len(spans) else 0
    near = max(0, min(end - queries - rule.window + 1, indexed))
    steady = np.arange(min(rule.sinks, near)), np.arange(near, end)
    first, last = np.maximum(spans[:, 0], rule.sinks), np.minimum(spans[:, 1], near)
    found = []
    for of_head in scores:
        left, chosen = rule.budget, []
        for n in np.argsort(-of_head, kind="stable"):
            if left == 0:
                break
            if 0 < last[n] - first[n] <= left:
                left -= int(last[n] - first[n])
                chosen.append(int(n))
        chosen.sort()
        rows = np.concatenate([steady[0], *(np.arange(first[n], last[n]) for n in chosen), steady[1]])
        found.append(_Taken(rows.astype(np.int64), np.array(chosen, np.int64)))
    return found


def _attend(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    taken: list[_Taken],
    rule: _Rule,
    rope_base: float | None,
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Each KV head's group is a sequence, with its rows as keys; the last of these are the queries' own."""
    heads, rows, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    keys, values = (np.concatenate([x[h, head.rows] for h, head in enumerate(taken)])[:, None] for x in (k, v))
    queries = q.reshape(kv_heads, group, rows, dim).swapaxes(1, 2)  # [Hkv, rows, group, D]
    if rope_base is not None:
        places = np.concatenate([np.arange(len(head.rows)) for head in taken])
        keys = turned(np.asarray(keys, np.float32), places[:, None], rope_base)
        own = np.array([[len(head.rows) - rows + r for r in range(rows)] for head in taken])
        queries = turned(np.asarray(queries, np.float32), own[:, :, None], rope_base)
        values = np.asarray(values, np.float32)
    bounds = np.cumsum([0, *(len(head.rows) for head in taken)])
    packed = np.ascontiguousarray(queries).reshape(kv_heads * rows, group, dim)
    out, lse = attention_varlen(
        packed, keys, values, rows * np.arange(kv_heads + 1), bounds, causal=True, scale=rule.scale, return_lse=True
    )
    flat = out.reshape(kv_heads, rows, group, -1).swapaxes(1, 2).reshape(heads, rows, -1)
    sums = lse.reshape(group, kv_heads, rows).swapaxes(0, 1).reshape(heads, rows)
    return flat.astype(q.dtype, copy=False), sums


def _stats(taken: list[tuple[int, list[_Taken]]], spans: Spans, stand_ins: int) -> SpanStats:
    by_head = list(zip(*(picked for _, picked in taken), strict=True))
    return SpanStats(
        np.array([end for end, _ in taken], np.int64),
        np.full(len(taken), stand_ins if len(spans) else 0, np.int64),
        np.array([[len(head.rows) for head in heads] for heads in by_head], np.int64),
        [[head.spans for head in heads] for heads in by_head],
    )


def _rule(
    sinks: object,
    window: object,
    budget: object,
    block: object,
    group_reduce: Any,
    row_reduce: Any,
    scale: object,
    dim: int,
) -> _Rule:
    for value, name, allowed in ((group_reduce, "group_reduce", GroupReduce), (row_reduce, "row_reduce", RowReduce)):
        one_of(value, name, get_args(allowed))
    return _Rule(
        integer(sinks, "sinks", 0),
        integer(window, "window", 1),
        integer(budget, "budget", 0),
        integer(block, "block", 1),
        group_reduce,
        row_reduce,
        scale_factor(scale, dim),
    )


def _checked_rows(representatives: Array, spans: Spans) -> NDArray[np.int64]:
    x = as_numpy(representatives, "representatives")
    if x.dtype.kind not in "iu":
        raise TypeError(f"representatives: got dtype {x.dtype}, expected integers")
    if x.ndim != 2 or len(x) != len(spans) or x.shape[1] == 0:
        raise ValueError(f"representatives: got shape {x.shape}, expected [{len(spans)}, n_rep]")
    rows = x.astype(np.int64)
    if ((rows < spans[:, :1]) | (rows >= spans[:, 1:])).any():
        raise ValueError("representatives: got rows outside of their spans, expected rows of each span")
    return rows


METHOD = Method(
    name="ltri_span_attention",
    family="retrieval",
    title="Ltri-LLM: Streaming Long Context Inference for LLMs with Training-Free Dynamic Triangular Attention Pattern",
    year=2024,
    arxiv="2412.04757",
    function=ltri_span_attention,
    reference=reference.ltri_span_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A budget of every row is causal attention.",
        "Without a budget it is attention to sinks and window.",
        "Spans tile their segment.",
        "Scores by sums over prefixes are the triangles' sums.",
        "A map that is `theta` everywhere gives scores of 0 and one span.",
        "Steps of `LtriCache` give what the function gives with its spans.",
    ),
    tests="tests/retrieval/test_ltri_span_attention.py",
    cost="`Hq * m * n_rep * D` multiply-adds to score `m` spans, and attention over sinks, budget and window; per "
    "segment of `n` tokens, its attention map and `n * (n + max_len)` to find spans.",
)
