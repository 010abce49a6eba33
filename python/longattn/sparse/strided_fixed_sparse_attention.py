"""The patterns of the Sparse Transformer: local, strided and fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like
from longattn._checks import batched, dense_inputs, flag, integer, integers, items_of, one_of, scale_factor
from longattn.dense.attention import attention
from longattn.dense.attention_varlen import attention_varlen
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._aligning import aligned
from longattn.sparse._selecting import aligned_first, block_bounds, keep_integers, only_causal, selector_inputs
from longattn.sparse.composed import Composable
from longattn.sparse.index_sparse_attention import index_sparse_attention
from longattn.sparse.row_lists import RowLists

#: What a head may see.
PATTERNS = ("local", "strided", "local_strided", "fixed_local", "fixed_summary", "fixed")

Parts = tuple[NDArray[Any], NDArray[np.float32]]


def fixed_lists(
    lengths: tuple[int, int], stride: int, *, summary: int, slots: int = 1, heads: int = 1, pattern: str = "fixed"
) -> RowLists:
    """The lists of the fixed patterns, for blocks of `stride` positions.

    Args:
        lengths: the numbers of queries and of keys, `(Lq, Lk)`.
        stride: positions of a block.
        summary: last positions of a block, or of one of its slots, that later blocks see.
        slots: slots of that width; head `h` sees the one `h % slots` before the last.
        heads: heads that have lists of their own; 1 where there is one slot.
        pattern: "fixed", "fixed_local" or "fixed_summary".

    Returns:
        The lists, to be used with `causal`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: sizes that do not fit.
    """
    given = integers(lengths, "lengths", 0)
    if len(given) != 2:
        raise ValueError(f"lengths: got {len(given)} numbers, expected 2, of queries and keys")
    (rows, keys), stride = given, integer(stride, "stride", 1)
    summary, slots, heads = integer(summary, "summary", 1), integer(slots, "slots", 1), integer(heads, "heads", 1)
    one_of(pattern, "pattern", ("fixed", "fixed_local", "fixed_summary"))
    if pattern != "fixed_local":
        _check_slots(slots, summary, stride)
    first = aligned_first((rows, keys), stride)
    bounds = np.clip(block_bounds(rows, stride, first) + (keys - rows), 0, keys)
    own = bounds[:-1] // stride * stride
    inside = np.arange(keys) % stride
    lists = []
    for head in range(heads):
        end = stride - summary * (head % slots)
        columns = np.flatnonzero((inside >= end - summary) & (inside < end))
        for start, last in zip(own, bounds[1:], strict=True):
            parts = []
            if pattern != "fixed_local":
                parts.append(columns[columns < (last if pattern == "fixed_summary" else start)])
            if pattern != "fixed_summary":
                parts.append(np.arange(start, last))
            lists.append(np.concatenate(parts))
    return _of_lists(lists, heads, (rows, keys), stride, first)


def _of_lists(
    lists: Sequence[NDArray[Any]], heads: int, lengths: tuple[int, int], block_q: int, first_q: int | None = None
) -> RowLists:
    """Lists of one head after another."""
    ends = np.cumsum([0, *(len(x) for x in lists)])
    count = len(lists) // heads
    return RowLists(
        indptr=ends[np.arange(heads)[:, None] * count + np.arange(count + 1)].reshape(1, heads, count + 1),
        indices=np.concatenate([np.zeros(0, np.uint32), *lists]),
        lengths=lengths,
        block_q=block_q,
        first_q=first_q,
    )


def _near_and_far(lengths: tuple[int, int], pattern: str, stride: int, window: int) -> RowLists:
    """The lists of "local", "strided" or "local_strided", one for each query."""
    rows, keys = lengths
    lists = []
    for own in range(keys - rows, keys):
        # Keys along the stride that the window has not, then those of the window.
        first = own + 1 if pattern == "strided" else max(own - window + 1, 0)
        far = np.zeros(0, np.int64) if pattern == "local" else np.arange(own % stride, first, stride)
        lists.append(np.concatenate([far, np.arange(first, own + 1)]).astype(np.uint32))
    return _of_lists(lists, 1, lengths, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StridedFixed(Composable):
    """The patterns of `strided_fixed_sparse_attention` as lists, to be looked at and put together with others.

    Attention over the lists of "strided" and "local_strided", one for each query, takes longer than that function.

    Args:
        stride: the stride, or the positions of a block.
        pattern: one of the six, or one for each query head.
        window: keys of "local", the own one included; `None` is `stride`.
        summary: keys of a slot, for "fixed" and "fixed_summary".
        slots: slots of a block that heads share out; together they have at most `stride` keys.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size below 1, an unknown pattern, or slots that are wider than a block.
    """

    stride: int
    pattern: str | Sequence[str] = "local_strided"
    window: int | None = None
    summary: int = 8
    slots: int = 1

    def __post_init__(self) -> None:
        """Checks sizes and names."""
        keep_integers(self, stride=1, summary=1, slots=1)
        if self.window is not None:
            keep_integers(self, window=1)
        names = (self.pattern,) if isinstance(self.pattern, str) else items_of(self.pattern, "pattern", "names")
        object.__setattr__(self, "pattern", self.pattern if isinstance(self.pattern, str) else names)
        for name in names:
            one_of(name, "pattern", PATTERNS)
        if not {"fixed", "fixed_summary"}.isdisjoint(names):
            _check_slots(self.slots, self.summary, self.stride)

    def __call__(self, q: Array, k: Array, *, causal: bool = True, scale: float | None = None) -> RowLists:
        """The lists for these lengths; numbers in `q` and `k` do not matter."""
        del scale
        only_causal(causal)
        qn, kn = selector_inputs(q, k)
        lengths, heads = (qn.shape[2], kn.shape[2]), qn.shape[1]
        if isinstance(self.pattern, str):
            return self._of_pattern(self.pattern, lengths, heads)
        if len(self.pattern) != heads:
            raise ValueError(f"pattern: got {len(self.pattern)} names, expected one, or {heads} of them")
        names = list(dict.fromkeys(self.pattern))
        tables = aligned([self._of_pattern(name, lengths, heads) for name in names], "pattern")
        return RowLists.per_head(tables, [names.index(name) for name in self.pattern])

    def _of_pattern(self, pattern: str, lengths: tuple[int, int], heads: int) -> RowLists:
        if not pattern.startswith("fixed"):
            near = self.stride if self.window is None else self.window
            return _near_and_far(lengths, pattern, self.stride, near)
        own = heads if self.slots > 1 and pattern != "fixed_local" else 1
        return fixed_lists(lengths, self.stride, summary=self.summary, slots=self.slots, heads=own, pattern=pattern)


def _check_slots(slots: int, summary: int, stride: int) -> None:
    if slots * summary > stride:
        raise ValueError(f"summary: got {slots} slots of {summary} keys, expected at most {stride} keys together")


def strided_fixed_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    stride: int,
    pattern: str | Sequence[str] = "local_strided",
    window: int | None = None,
    summary: int = 8,
    slots: int = 1,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention over one of the patterns of the Sparse Transformer, about `sqrt(L)` keys for each query.

    A query at position `i` sees, of the keys `j <= i`:

    - "local": `i - j < window`;
    - "strided": `(i - j) % stride == 0`;
    - "local_strided": either, each key once;
    - "fixed_local": `j // stride == i // stride`;
    - "fixed_summary": keys of slot `h % slots`: `stride - summary * (m + 1) <= j % stride < stride - summary * m`;
    - "fixed": the block of "fixed_local", and of the blocks before it the keys of "fixed_summary".

    Layers may take patterns by turns, heads of a layer may have different ones, and the two that are unions are the
    merged form. Strided attention is computed as one sequence for each residue of the stride.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, those of the last `Lq` keys.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        stride: the stride, or the positions of a block; about the root of the length.
        pattern: one of the six, or one for each query head.
        window: keys of "local", the own one included; `None` is `stride`. (The paper's text writes `stride + 1`.)
        summary: keys of a slot, for "fixed" and "fixed_summary".
        slots: slots of a block that heads share out; together they have at most `stride` keys.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; with `return_lse` the pair
        `(output, lse)`, `lse` float32 `[B, Hq, Lq]` (or `[Hq, Lq]`).

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, an unknown pattern, or slots that are wider than a block.

    Cost:
        `Lq * (window + Lk / stride) * (D + Dv)` multiply-adds per query head, and copies in the order of the residues;
        of the fixed patterns `Lq * (stride + summary * Lk / stride) * (D + Dv)`.

    References:
        R. Child et al., "Generating Long Sequences with Sparse Transformers", 2019, arXiv:1904.10509.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 300, 16), dtype=np.float32)
        >>> out = la.sparse.strided_fixed_sparse_attention(q, k, v, stride=1, pattern="strided")
        >>> np.allclose(out, la.attention(q, k, v, causal=True), atol=1e-5)
        True
    """
    q3, k3, v3 = dense_inputs(q, k, v)
    qn, kn = selector_inputs(q3, k3)
    vn, return_lse = batched(v3, 4), flag(return_lse, "return_lse")
    heads, dim = qn.shape[1], qn.shape[3]
    stride = integer(stride, "stride", 1)
    near = stride if window is None else integer(window, "window", 1)
    summary, slots = integer(summary, "summary", 1), integer(slots, "slots", 1)
    of_heads = [pattern] * heads if isinstance(pattern, str) else list(items_of(pattern, "pattern", "names"))
    unknown = [x for x in of_heads if x not in PATTERNS]
    if unknown or len(of_heads) != heads:
        raise ValueError(f"pattern: got {pattern!r}, expected one of {PATTERNS}, or {heads} of them")
    if not {"fixed", "fixed_summary"}.isdisjoint(of_heads):
        _check_slots(slots, summary, stride)
    factor = scale_factor(scale, dim)
    out = np.zeros((*qn.shape[:3], vn.shape[3]), q3.dtype)
    lse = np.full(qn.shape[:3], -np.inf, np.float32)
    kv_of = np.arange(heads) // (heads // kn.shape[1])
    for name in dict.fromkeys(of_heads):
        some = np.flatnonzero([x == name for x in of_heads])
        whole = len(some) == heads
        parts = (qn, kn, vn) if whole else (qn[:, some], kn[:, kv_of[some]], vn[:, kv_of[some]])
        found = _of_pattern(name, *parts, some, stride, near, summary, slots, factor)
        out[:, some], lse[:, some] = found
    result = like(q, out.reshape(*q3.shape[:-1], vn.shape[3]))
    return (result, like(q, lse.reshape(q3.shape[:-1]))) if return_lse else result


def _of_pattern(
    name: str,
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    heads: NDArray[np.int64],
    stride: int,
    window: int,
    summary: int,
    slots: int,
    scale: float,
) -> Parts:
    """Output and lse of some heads."""
    if name == "strided":
        return _strided(q, k, v, stride, 0, scale)
    if name in ("local", "local_strided"):
        near: Parts = attention(q, k, v, causal=True, window=(window - 1, 0), scale=scale, return_lse=True)
        if name == "local":
            return near
        # Of the stride's keys those that the window has not.
        return _strided(q, k, v, stride, -(-window // stride), scale, near)
    own = slots > 1 and name != "fixed_local"
    # Lists of heads that are not all of them begin with another slot.
    lists = fixed_lists(
        (q.shape[2], k.shape[2]), stride, summary=summary, slots=slots, heads=int(heads[-1]) + 1 if own else 1,
        pattern=name,
    )  # fmt: skip
    if own and lists.shape[1] != len(heads):
        lists = RowLists.per_head([_head(lists, h) for h in heads], range(len(heads)))
    found: Parts = index_sparse_attention(q, k, v, lists, causal=True, scale=scale, return_lse=True)
    return found


def _head(lists: RowLists, head: int) -> RowLists:
    """One head of lists of one batch."""
    indptr = lists.indptr[:, head : head + 1]
    first, last = int(indptr.min()), int(indptr.max())
    return RowLists(
        indptr=indptr - first, indices=lists.indices[first:last], lengths=lists.lengths, block_q=lists.block_q,
        first_q=lists.first_q,
    )  # fmt: skip


def _strided(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    stride: int,
    skipped: int,
    scale: float,
    state: Parts | None = None,
) -> Parts:
    """Attention along the stride without the `skipped` nearest keys of it, a sequence for each residue."""
    rows, keys = q.shape[2], k.shape[2]
    stride = min(stride, max(keys, 1))  # beyond that every key is by itself
    positions = np.arange(rows) + (keys - rows)
    of_q, of_k = positions % stride, np.arange(keys) % stride
    counts_q, counts_k = (np.bincount(x, minlength=stride) for x in (of_q, of_k))
    left = np.maximum(counts_k - skipped, 0)
    order_q = np.argsort(of_q, kind="stable")
    order_k = np.argsort(of_k, kind="stable")
    # The last keys of each residue are skipped.
    starts = np.cumsum(counts_k) - counts_k
    order_k = order_k[np.arange(keys) - np.repeat(starts, counts_k) < np.repeat(left, counts_k)]
    bounds = [np.concatenate([[0], np.cumsum(x)]) for x in (counts_q, left)]
    out = np.empty((*q.shape[:3], v.shape[3]), q.dtype)
    lse = np.empty(q.shape[:3], np.float32)
    for b in range(q.shape[0]):
        packed = (
            np.take(x[b], order, axis=1).swapaxes(0, 1) for x, order in ((q, order_q), (k, order_k), (v, order_k))
        )
        earlier = None if state is None else (state[0][b][:, order_q].swapaxes(0, 1), state[1][b][:, order_q])
        found, part = attention_varlen(*packed, *bounds, causal=True, scale=scale, state=earlier, return_lse=True)
        out[b][:, order_q], lse[b][:, order_q] = found.swapaxes(0, 1), part
    return out, lse


METHOD = Method(
    name="strided_fixed_sparse_attention",
    family="sparse",
    title="Generating Long Sequences with Sparse Transformers",
    year=2019,
    arxiv="1904.10509",
    function=strided_fixed_sparse_attention,
    reference=reference.strided_fixed_sparse_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "With a window of all keys the local pattern is causal attention.",
        "With a stride of 1 the strided pattern is causal attention.",
        "With a summary of the whole block the fixed pattern is causal attention.",
        "The strided pattern is causal attention of the sequences of each residue.",
        "Every earlier position is reached in two hops, strided after local and summary after own block.",
        "Steps give the rows of the prefill.",
        "Attention over the selector's lists is the same.",
    ),
    tests="tests/sparse/test_strided_fixed_sparse_attention.py",
    cost="`Lq * (window + Lk / stride) * (D + Dv)`, or `Lq * (stride + summary * Lk / stride) * (D + Dv)`.",
    mask=lambda: seen(strided_fixed_sparse_attention, *example(), stride=12),
)
