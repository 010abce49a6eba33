"""Linear attention of L2ViT: a denominator that is not let below a bound."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn._arrays import Array
from longattn._checks import finite, per_head
from longattn.linear._global import attend, inputs
from longattn.methods import Method
from longattn.reference import linear as reference


def l2vit_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    tau: Array | None = None,
    den_min: float = 100.0,
    mask: Array | None = None,
    out: Array | None = None,
) -> Any:
    """`tau_h relu(q_i)^T S / max(relu(q_i)^T z, den_min)`, `S = sum_j relu(k_j) v_j^T`, `z = sum_j relu(k_j)`.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        tau: floating `[Hq]`, learned factors of the output; `None` is `D ** -0.5`.
        den_min: the least denominator, at least 0. The published code has 100 where keys are summed up first, as here,
            and 1 in its other order.
        mask: boolean `[Lk]` or `[B, Lk]`; True lets the key count.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; zeros where the denominator is
        0.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(Hq * Lq + Hkv * Lk) * D * Dv` multiply-adds.

    References:
        C. Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025, arXiv:2501.16182.
    """
    qn, _, _ = arrays = inputs(q, k, v)
    heads, dim = qn.shape[1], qn.shape[3]
    factors = np.full(heads, dim**-0.5, np.float32) if tau is None else per_head(tau, "tau", heads)
    least = finite(den_min, "den_min")
    if least < 0:
        raise ValueError(f"den_min: got {den_min}, expected at least 0")
    maps = {"map": "relu"}, {"map": "relu"}
    return attend(q, arrays, maps, ("clamp", least, 0.0), mask=mask, factors=factors, out=out)


METHOD = Method(
    name="l2vit_linear_attention",
    family="linear",
    title="The Linear Attention Resurrection in Vision Transformer",
    year=2025,
    arxiv="2501.16182",
    function=l2vit_linear_attention,
    reference=reference.l2vit_linear_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "With `den_min=0` and `tau` 1 it is normalised ReLU linear attention.",
        "Where every denominator is below `den_min`, the output is linear in the features of the query.",
        "It is the product in the other order with the same `den_min`.",
        "`tau` multiplies the output.",
    ),
    tests="tests/linear/test_l2vit_linear_attention.py",
    cost="`(Hq * Lq + Hkv * Lk) * D * Dv` multiply-adds.",
)
