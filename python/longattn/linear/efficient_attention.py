"""Efficient attention: softmax over channels of queries and over positions of keys."""

from __future__ import annotations

from typing import Any

from longattn._arrays import Array
from longattn._checks import one_of
from longattn.linear._global import attend, inputs
from longattn.methods import Method
from longattn.reference import linear as reference


def efficient_attention(
    q: Array, k: Array, v: Array, *, norm: str = "softmax", mask: Array | None = None, out: Array | None = None
) -> Any:
    """`rho_q(Q) (rho_k(K)^T V)`: a row of keys' channels is summed up once, and read by every query.

    With `norm="softmax"`, `rho_q` is the softmax over the channels of each query and `rho_k` the softmax of each
    channel over all keys; with "scaling" both divide by the square root of the number of keys. There is no `D ** -0.5`.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        norm: "softmax" or "scaling".
        mask: boolean `[Lk]` or `[B, Lk]`; True lets the key count. Masked keys have no part in the softmax over
            positions, nor in the number of keys.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; zeros without keys.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(Hq * Lq + Hkv * Lk) * D * Dv` multiply-adds, `D * Dv` numbers of memory per head.

    References:
        Z. Shen et al., "Efficient Attention: Attention with Linear Complexities", 2018, arXiv:1812.01243.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 4, 100, 16), dtype=np.float32)
        >>> la.linear.efficient_attention(q, k, v).shape
        (1, 4, 100, 16)
    """
    arrays = inputs(q, k, v)
    one_of(norm, "norm", ("softmax", "scaling"))
    if norm == "softmax":
        maps = {"map": "softmax"}, {"map": "position_softmax"}
        return attend(q, arrays, maps, ("plain", 1.0, 0.0), mask=mask, out=out)
    return attend(q, arrays, ({}, {}), ("plain_means", 1.0, 0.0), mask=mask, out=out)


METHOD = Method(
    name="efficient_attention",
    family="linear",
    title="Efficient Attention: Attention with Linear Complexities",
    year=2018,
    arxiv="1812.01243",
    function=efficient_attention,
    reference=reference.efficient_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "Rows of the softmax form are non-negative and sum to 1.",
        "The scaling form is `q k^T v` over the number of keys.",
        "A single key returns its value.",
        "Results do not depend on how keys fall into blocks.",
    ),
    tests="tests/linear/test_efficient_attention.py",
    cost="`(Hq * Lq + Hkv * Lk) * D * Dv` multiply-adds.",
)
