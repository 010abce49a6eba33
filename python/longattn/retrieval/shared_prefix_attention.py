"""Sequences that begin alike: the beginning is retrieved from once for all of them, what follows is each one's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import FLOATS, Array, as_numpy, like
from longattn._checks import items_of, one_of, per_head, scale_factor
from longattn.dense import attention, merge
from longattn.index import Index
from longattn.kv import KVStore, PrefixTree, chunk_attention
from longattn.retrieval.retrieval_attention import RetrievalStats, retrieval_attention, retrieval_attention_batch

#: Queries that a scan of one KV head serves.
_GROUP = 64


@dataclass(frozen=True, slots=True)
class SharedPrefixResult:
    """Result of `shared_prefix_attention`.

    Attributes:
        out: `[B, Hq, Lq, Dv]`, the kind and dtype of `q`.
        lse: float32 `[B, Hq, Lq]`, natural log of the denominator over prefix and tail.
        stats: of each scan of the prefix, what it read and missed; axes of query heads are `[Hkv * queries * G]`,
            the `queries` of the scan in the order of sequences and positions. Empty with `return_stats=False`.
        queries_per_scan: rows of `q` (of all sequences) that a scan served, the last one fewer.
    """

    out: Array
    lse: Array
    stats: tuple[RetrievalStats, ...]
    queries_per_scan: int


def shared_prefix_attention(
    q: Array,
    prefix: KVStore,
    index: Index,
    tails: Sequence[KVStore] | PrefixTree,
    tail_indexes: Sequence[Index] | None = None,
    *,
    sequences: Iterable[int] | None = None,
    top_k: int | None = None,
    tail_top_k: int | None = None,
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
    rest: Literal["values", "none"] | None = None,
    sink_logits: Array | None = None,
    return_stats: bool = True,
    return_selected: bool = False,
) -> SharedPrefixResult:
    """Causal attention of several sequences with one long beginning, which is scanned once for all their queries.

    Sequence `b` is the rows of `prefix`, then those of `tails[b]`; its queries are the last `Lq` rows of the tail. The
    queries of all sequences that share a KV head are one query group for the index of the prefix: its codes are read
    once, rows are selected once, by the mean of all queries' shares, and read once. Up to 64 queries go into one
    scan; more take several. Tails are read in full, or through indexes of their own. Both parts are merged exactly.

    Tails that begin alike in their turn, as turns of a conversation do, may be the sequences of a `PrefixTree`, with
    the tokens that follow the prefix: `chunk_attention` then reads what several of them share once.

    Args:
        q: queries `[B, Hq, Lq, D]`, float32, float16 or bfloat16; at most 64 query heads per KV head.
        prefix: the common beginning, at least one row.
        index: an index of `prefix`, brought up to date first.
        tails: a store for each sequence with what follows, at least the `Lq` rows of its queries. No store twice. Or a
            tree with a sequence for each; `Lq` is 1 then.
        tail_indexes: indexes of the tails; `None` reads them in full. Not with a tree.
        sequences: with a tree, the numbers of its sequences that the queries belong to, each at most once; `None` is
            all of them, ascending.
        top_k: rows of the prefix to select per KV head and scan, beside `sinks`, for all queries together. `None` is
            1 % of the rows, at least 64.
        tail_top_k: rows of each tail to select, likewise; only with `tail_indexes`.
        sinks: first rows of the prefix that are always read.
        window: last rows of a tail that are always read; without meaning where tails are read in full.
        scale: factor of the logits; `None` is `D ** -0.5`.
        rest: what becomes of rows that are not read, as in `retrieval_attention`.
        sink_logits: floating `[Hq]`, an extra logit per head that takes part in the denominator only.
        return_stats: return what was read of the prefix.
        return_selected: also list the rows selected.

    Returns:
        A `SharedPrefixResult`. With budgets of every row, what attention over each whole sequence gives.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit the stores, a tail shorter than its queries, a store or an index that is
            another's, budgets out of range.

    Cost:
        One scan of the prefix per 64 queries of a KV head instead of one per sequence, the rows it selects once, and
        the tails.

    References:
        L. Ye et al., "ChunkAttention: Efficient Self-Attention with Prefix-Aware KV Cache and Two-Phase Partition",
        2024, arXiv:2402.15220, for reading a shared beginning once; there all of it.
    """
    queries = _queries(q, prefix)
    batch, heads, rows, dim = queries.shape
    if sink_logits is not None:
        per_head(sink_logits, "sink_logits", heads)
    if isinstance(tails, PrefixTree):
        numbers = _check_tree(tails, tail_indexes, sequences, prefix, batch, rows)
    else:
        if sequences is not None:
            raise ValueError(f"sequences: got {sequences} with tails in stores, expected them with a PrefixTree")
        _check_tails(tails, tail_indexes, prefix, batch, rows)
    if tail_top_k is not None and tail_indexes is None:
        raise ValueError(f"tail_top_k: got {tail_top_k} without tail_indexes, expected indexes of the tails")
    one_of(rest, "rest", ("values", "none", None))
    factor = scale_factor(scale, dim)
    wide = np.ascontiguousarray(queries, np.float32)
    found, stats, per_scan = _of_prefix(
        wide, prefix, index, top_k, sinks, factor, rest, return_stats=return_stats, return_selected=return_selected
    )
    if isinstance(tails, PrefixTree):
        out, lse = chunk_attention(
            wide[:, :, 0], tails, sequences=numbers, scale=factor, sinks=sink_logits, return_lse=True
        )
        ends = (out[:, :, None], lse[:, :, None])
    elif tail_indexes is None:
        own = [
            attention(one, tail.keys, tail.values, causal=True, scale=factor, sinks=sink_logits, return_lse=True)
            for one, tail in zip(wide, tails, strict=True)
        ]
        ends = (np.stack([out for out, _ in own]), np.stack([lse for _, lse in own]))
    else:
        several = retrieval_attention_batch(
            list(wide),
            tails,
            tail_indexes,
            top_k=tail_top_k,
            sinks=0,
            window=window,
            scale=factor,
            rest=rest,
            sink_logits=sink_logits,
            return_stats=False,
        )
        ends = (np.stack([one.out for one in several]), np.stack([one.lse for one in several]))
    out, lse = merge([found, ends])
    return SharedPrefixResult(like(q, out.astype(queries.dtype)), like(q, lse), tuple(stats), per_scan)


def _queries(q: Array, prefix: KVStore) -> NDArray[Any]:
    queries = as_numpy(q, "q")
    if not isinstance(prefix, KVStore):
        raise TypeError(f"prefix: got {type(prefix).__name__}, expected a KVStore")
    if queries.dtype not in FLOATS:
        raise TypeError(f"q: got dtype {queries.dtype}, expected float32, float16 or bfloat16")
    if queries.ndim != 4 or 0 in queries.shape:
        raise ValueError(f"q: got shape {queries.shape}, expected [B, Hq, Lq, D] without an axis of 0")
    heads, group = queries.shape[1], queries.shape[1] // prefix.kv_heads
    if heads % prefix.kv_heads or not 1 <= group <= _GROUP or queries.shape[3] != prefix.head_dim:
        raise ValueError(
            f"q: got {heads} heads of width {queries.shape[3]}, expected a multiple of the {prefix.kv_heads} heads of "
            f"the prefix, at most {_GROUP} times, of width {prefix.head_dim}"
        )
    return queries


def _check_tails(
    tails: Sequence[KVStore], indexes: Sequence[Index] | None, prefix: KVStore, batch: int, rows: int
) -> None:
    items_of(tails, "tails", "stores")
    if indexes is not None:
        items_of(indexes, "tail_indexes", "indexes")
    if len(tails) != batch or (indexes is not None and len(indexes) != batch):
        counts = f"{len(tails)} tails" + ("" if indexes is None else f" and {len(indexes)} indexes")
        raise ValueError(f"tails: got {counts} for {batch} sequences, expected one for each")
    for b, tail in enumerate(tails):
        if not isinstance(tail, KVStore):
            raise TypeError(f"tails[{b}]: got {type(tail).__name__}, expected a KVStore")
        got = (tail.kv_heads, tail.head_dim, tail.value_dim)
        if got != (prefix.kv_heads, prefix.head_dim, prefix.value_dim):
            raise ValueError(f"tails[{b}]: got heads and widths {got}, expected those of the prefix")
        if len(tail) < rows:
            raise ValueError(f"tails[{b}]: got {len(tail)} rows, expected at least those of the {rows} queries")
    if len({id(store) for store in (prefix, *tails)}) <= batch:
        raise ValueError("tails: got a store twice, expected a store of its own for each sequence")


def _check_tree(
    tree: PrefixTree,
    indexes: Sequence[Index] | None,
    sequences: Iterable[int] | None,
    prefix: KVStore,
    batch: int,
    rows: int,
) -> list[int]:
    """The numbers of the tails' sequences."""
    if indexes is not None:
        raise ValueError("tail_indexes: got indexes beside a PrefixTree, expected none: its sequences are read in full")
    if rows != 1:
        raise ValueError(f"q: got {rows} queries of each sequence with a PrefixTree, expected one")
    got = (tree.kv_heads, tree.head_dim, tree.value_dim)
    if got != (prefix.kv_heads, prefix.head_dim, prefix.value_dim):
        raise ValueError(f"tails: got a tree of heads and widths {got}, expected those of the prefix")
    numbers = tree.sequences if sequences is None else list(sequences)
    if len(numbers) != batch:
        raise ValueError(f"sequences: got {len(numbers)} for {batch} queries, expected one for each")
    for number in numbers:
        if tree.length(number) == 0:
            raise ValueError(f"sequences: got number {number} without tokens, expected at least that of its query")
    return numbers


def _of_prefix(
    q: NDArray[np.float32],
    prefix: KVStore,
    index: Index,
    top_k: int | None,
    sinks: int,
    scale: float,
    rest: Literal["values", "none"] | None,
    *,
    return_stats: bool,
    return_selected: bool,
) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], list[RetrievalStats], int]:
    """Attention of all queries over the prefix, every one of which sees all of it."""
    batch, heads, rows, dim = q.shape
    kv_heads = prefix.kv_heads
    group = heads // kv_heads
    # [queries, Hkv, G, D]: sequences and positions are alike here.
    alike = q.transpose(0, 2, 1, 3).reshape(batch * rows, kv_heads, group, dim)
    per_scan = min(_GROUP // group, len(alike))
    out = np.empty((len(alike), kv_heads, group, prefix.value_dim), np.float32)
    lse = np.empty((len(alike), kv_heads, group), np.float32)
    stats = []
    for first in range(0, len(alike), per_scan):
        part = alike[first : first + per_scan]
        found = retrieval_attention(
            part.transpose(1, 0, 2, 3).reshape(-1, 1, dim),
            prefix,
            index,
            top_k=top_k,
            sinks=sinks,
            window=0,
            scale=scale,
            rest=rest,
            return_stats=return_stats,
            return_selected=return_selected,
        )
        by_head = (kv_heads, len(part), group)
        out[first : first + per_scan] = found.out.reshape(*by_head, -1).transpose(1, 0, 2, 3)
        lse[first : first + per_scan] = found.lse.reshape(by_head).transpose(1, 0, 2)
        if found.stats is not None:
            stats.append(found.stats)
    outs = out.reshape(batch, rows, heads, -1).transpose(0, 2, 1, 3)
    lses = lse.reshape(batch, rows, heads).transpose(0, 2, 1)
    return (np.ascontiguousarray(outs), np.ascontiguousarray(lses)), stats, per_scan
