"""Multi-query attention: all query heads share one head of keys and values."""

from __future__ import annotations

from typing import Any

from longattn._arrays import Array
from longattn._checks import shape_of
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import dense as reference


def multi_query_attention(q: Array, k: Array, v: Array, *, scale: Any = None, **options: Any) -> Any:
    """Attention of all query heads over one head of keys and values, `softmax(scale * q_h @ k^T) @ v`.

    The original formulation has no factor on the logits; `scale=1.0` gives that one.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, 1, Lk, D]`, or `[1, Lk, D]`; any of the three dtypes.
        v: values `[B, 1, Lk, Dv]`, or `[1, Lk, Dv]`; dtype of `k`.
        scale: factor on the logits, as in `longattn.attention`; `None` is `D ** -0.5`.
        options: every other option of `longattn.attention`.

    Returns:
        As `longattn.attention`: the output in the kind and dtype of `q`, with `return_lse` the pair with lse.

    Raises:
        TypeError: as `longattn.attention`.
        ValueError: as `longattn.attention`, and more than one KV head.

    Cost:
        `Hq * Lq * visible keys * (D + Dv)` multiply-adds; a decode step reads `Lk * (D + Dv)` numbers, an `Hq`-th
        of multi-head attention.

    References:
        N. Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", 2019, arXiv:1911.02150.

    Example:
        >>> import numpy as np, longattn as la
        >>> q = np.ones((1, 8, 1, 64), np.float32)
        >>> k = v = np.ones((1, 1, 10, 64), np.float32)
        >>> la.dense.multi_query_attention(q, k, v, causal=True).shape
        (1, 8, 1, 64)
    """
    shape = shape_of(k, "k")
    if len(shape) >= 3 and shape[-3] != 1:
        raise ValueError(f"k: got {shape[-3]} heads, expected 1 (several are grouped_query_attention)")
    return attention(q, k, v, scale=scale, **options)


METHOD = Method(
    name="multi_query_attention",
    family="exact",
    title="Fast Transformer Decoding: One Write-Head is All You Need",
    year=2019,
    arxiv="1911.02150",
    function=multi_query_attention,
    reference=reference.multi_query_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "It equals multi-head attention over keys and values that are given to every head.",
        "It equals grouped-query attention with one KV head.",
        "One query head is single-head attention.",
    ),
    tests="tests/dense/test_multi_query_attention.py",
    cost="`Hq * Lq * visible keys * (D + Dv)` multiply-adds; a decode step reads `Lk * (D + Dv)` numbers.",
)
