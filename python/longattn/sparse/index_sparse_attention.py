"""Exact attention over chosen keys."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array
from longattn.gpu import is_on_gpu
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._call import call
from longattn.sparse._on_gpu import over_rows
from longattn.sparse.row_lists import RowLists


def index_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    lists: RowLists,
    *,
    causal: bool = False,
    return_lse: bool = False,
    out: Array | None = None,
    **options: Any,
) -> Any:
    """Softmax attention of each block of queries over its own list of keys, read where they lie.

    What `longattn.attention` computes with the mask that `lists` stands for, with `lists.bias` added to the logits.
    Empty lists give zeros and an lse of -inf.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes, or the `keys` of a `KVStore` of codes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        lists: which keys each block of queries attends to.
        causal: besides, a query sees only keys at its own position and before.
        return_lse: also return the log-sum-exp of the logits.
        out: array `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) of the kind and dtype of `q` that receives the result.
        options: `window`, `scale`, `softcap`, `bias`, `mask`, `alibi_slopes`, `sinks`, `relative_bias`,
            `relative_zero`, `segments`, `visible_until`, `skip_threshold` and `state` of `longattn.attention`. Those
            with a number per key are read key by key where listed keys do not follow one another.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`. With `return_lse`, the pair
        `(output, lse)`, `lse` float32 `[B, Hq, Lq]` (or `[Hq, Lq]`).

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or lists of another problem.

    Cost:
        `(D + Dv)` multiply-adds per query head, query and listed key. Where a list is for at most 8 rows (queries
        times query heads) its keys are read in place; for more they are packed, once for up to 192 rows.

    Arrays of a GPU go to `longattn.gpu`: one block of at most 16 queries per KV head, and of the options `scale`,
    `softcap`, `sinks` and `state`.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 4, 16), dtype=np.float32)
        >>> each = np.arange(5).reshape(1, 1, 5)
        >>> lists = la.RowLists(indptr=each, indices=np.arange(4), lengths=(4, 4), block_q=1)
        >>> np.allclose(la.index_sparse_attention(q, k, v, lists), v)
        True
    """
    if not isinstance(lists, RowLists):
        raise TypeError(f"lists: got {type(lists).__name__}, expected RowLists")
    if is_on_gpu(q):
        return over_rows(q, k, v, lists, causal=causal, return_lse=return_lse, out=out, **options)
    return call(
        _core.index_sparse,
        lists,
        "lists",
        (lists.bias, None),
        q,
        k,
        v,
        causal=causal,
        return_lse=return_lse,
        out=out,
        **options,
    )


def _example() -> NDArray[np.bool_]:
    """Every seventh key of a text, and each query's own."""
    listed = (np.arange(128) % 7 == 0) | np.eye(128, dtype=bool)
    indptr = np.concatenate([[0], np.cumsum(listed.sum(axis=1))])[None, None]
    lists = RowLists(indptr=indptr, indices=np.nonzero(listed)[1].astype(np.uint32), lengths=(128, 128), block_q=1)
    return seen(index_sparse_attention, *example(), lists)


METHOD = Method(
    name="index_sparse_attention",
    family="sparse",
    title="Generating Long Sequences with Sparse Transformers",
    year=2019,
    arxiv="1904.10509",
    function=index_sparse_attention,
    reference=reference.index_sparse_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "Lists of all keys are dense attention.",
        "A list of one key gives its value.",
        "Rows without keys give zeros and a log-sum-exp of minus infinity.",
    ),
    tests="tests/sparse/test_index_sparse_attention.py",
    cost="`(D + Dv)` multiply-adds per query head, query and listed key.",
    mask=_example,
)
