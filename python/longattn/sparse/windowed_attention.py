"""Exact attention to a range of keys around a place that each query has of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn import _core
from longattn._arrays import FLOAT64, Array
from longattn._checks import batched, dense_inputs, flag, returned
from longattn.dense._options import score_options
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._windows import ranges_mask, window_ranges


def windowed_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    radius: int | tuple[int, int] | Array,
    centre: Array | None = None,
    causal: bool = False,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    scale: float | Array | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention of each query to the keys around its centre, in windows that may differ by head and query.

    Query `i` of head `h` sees the keys from `centre[i] - left[h]` to `centre[i] + right[h]`, as far as they exist. One
    radius for all heads and centres at the queries' own positions is `longattn.attention` with a `window`. A query
    without keys gives zeros and an lse of -inf.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, or all of `q`, `k` and `v`
            float64: slowly, with a mask of all pairs.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        radius: keys seen on both sides of the centre: a number, a pair `(left, right)`, or integers `[Hq]` or
            `[Hq, 2]` by query head; not negative.
        centre: integers `[Lq]`, `[Hq, Lq]` or `[B, Hq, Lq]`, which may lie outside the keys; `None` is each query's own
            position, the last query being at the last key.
        causal: a query sees no key behind its own position.
        cu_seqlens_q: bounds `[S + 1]` of sequences that a batch of 1 holds one after another; queries see keys of their
            own sequence, in which centres and positions count.
        cu_seqlens_k: bounds of their keys; `None` are those of the queries.
        scale: as in `longattn.attention`.
        softcap: as in `longattn.attention`.
        sinks: as in `longattn.attention`.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`. With `return_lse`, the pair with
        the lse, float32 (float64 for float64) without the last axis.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a negative radius.

    Cost:
        Linear in queries times window where neighbouring queries look at neighbouring places: queries go through the
        matrix kernel together, with all keys between the first and the last that any of them sees. Heads of one KV head
        whose windows differ read keys one after another.

    References:
        T. Luong et al., "Effective Approaches to Attention-based Neural Machine Translation", 2015, arXiv:1508.04025,
        whose local attention has a window around a place that each query predicts.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 16), dtype=np.float32)
        >>> out = la.sparse.windowed_attention(q, k, v, radius=np.array([4, 16]))
        >>> np.allclose(out[:1], la.attention(q[:1], k[:1], v[:1], window=(4, 4)), atol=1e-5)
        True
    """
    qn, kn, vn = dense_inputs(q, k, v)
    rows, keys = qn.shape[-2], kn.shape[-2]
    ranges = window_ranges(qn.shape, keys, radius, centre, causal, cu_seqlens_q, cu_seqlens_k)
    return_lse = flag(return_lse, "return_lse")
    if qn.dtype == FLOAT64:
        mask = ranges_mask(ranges, qn.shape, keys)
        return attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, return_lse=return_lse)
    options = score_options(qn.shape, keys, span=rows + keys, scale=scale, softcap=softcap, sinks=sinks)
    result, lse = np.empty((*qn.shape[:-1], vn.shape[-1]), qn.dtype), np.empty(qn.shape[:-1], np.float32)
    if lse.size:
        q4, k4, v4, out4 = (batched(x, 4) for x in (qn, kn, vn, result))
        _core.windowed(q4, k4, v4, out4, batched(lse, 3), ranges, options)
    return returned(None, q, result, lse if return_lse else None)


METHOD = Method(
    name="windowed_attention",
    family="sparse",
    title="Effective Approaches to Attention-based Neural Machine Translation",
    year=2015,
    arxiv="1508.04025",
    function=windowed_attention,
    reference=reference.windowed_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    dtypes=("float32", "float16", "bfloat16", "float64"),
    checks=(
        "One radius at the queries' own positions is dense attention with a window.",
        "A radius as large as the length is dense attention.",
        "A sequence among others is that sequence alone.",
    ),
    tests="tests/sparse/test_windowed_attention.py",
    cost="`Hq * Lq * window * (D + Dv)` multiply-adds where neighbouring queries look at neighbouring places.",
    mask=lambda: seen(windowed_attention, *example(), radius=12, centre=np.arange(128) // 2 + 32),
)
