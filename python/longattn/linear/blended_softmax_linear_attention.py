"""A blend of softmax and linear attention per head."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn._arrays import Array, as_numpy
from longattn._checks import batched, check_floating, real, result_array, returned, scale_factor
from longattn.dense.attention import attention
from longattn.linear._global import attend, inputs
from longattn.linear.feature_map import FeatureMap, feature_map, parts
from longattn.methods import Method
from longattn.reference import linear as reference


def blended_softmax_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    r: float | Array,
    *,
    phi: str | FeatureMap = "softmax",
    scale: float | None = None,
    out: Array | None = None,
) -> Any:
    """`r softmax_attention + (1 - r) linear_attention`, `r` in 0 to 1 learned per layer and driven to either end.

    Only the branches that have a share are computed. The linear one is `phi(q)^T S / phi(q)^T z`.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        r: the share of softmax attention: a number, or a floating array of one.
        phi: the map of the linear branch, or its name. The paper's is learned and not said; `FeatureMap("softmax_pair",
            projection=W)`, the softmax of `W x` and of `-W x`, is a usual choice.
        scale: factor on the logits of the softmax branch; `None` is `D ** -0.5`.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        With `r=0`, `(Hq * Lq + Hkv * Lk) * F * Dv` multiply-adds; with 1, `Hq * Lq * Lk * (D + Dv)`; else both.

    References:
        "LinVideo: A Post-Training Framework towards O(n) Attention in Efficient Video Generation", 2025.
    """
    qn, kn, vn = arrays = inputs(q, k, v)
    x = as_numpy(np.asarray(real(r, "r")) if isinstance(r, int | float) else r, "r")
    if x.dtype.kind in "iu":
        x = x.astype(np.float32)
    check_floating(x, "r")
    if x.size != 1:
        raise ValueError(f"r: got shape {x.shape}, expected one number")
    share = float(x.reshape(()))
    if not 0 <= share <= 1:
        raise ValueError(f"r: got {share}, expected 0 to 1")
    chosen, factor, dim = feature_map(phi), scale_factor(scale, qn.shape[3]), qn.shape[3]
    maps = parts(chosen, qn.shape[1], dim, keys=False), parts(chosen, kn.shape[1], dim, keys=True)
    if share == 0:
        return attend(q, arrays, maps, ("divide", 0.0, 0.0), out=out)
    shape = (*qn.shape[:3], vn.shape[3])[4 - len(q.shape) :]
    result = result_array(out, q, shape, qn.dtype, {"q": qn, "k": kn, "v": vn})
    out4 = batched(result, 4)
    if share == 1:
        attention(qn, kn, vn, scale=factor, out=out4)
    else:
        wide = np.float32(share) * attention(qn, kn, vn, scale=factor).astype(np.float32, copy=False)
        wide += np.float32(1 - share) * attend(qn, arrays, maps, ("divide", 0.0, 0.0)).astype(np.float32, copy=False)
        out4[...] = wide
    return returned(out, q, result, None)


METHOD = Method(
    name="blended_softmax_linear_attention",
    family="linear",
    title="LinVideo: A Post-Training Framework towards O(n) Attention in Efficient Video Generation",
    year=2025,
    arxiv="2510.08318",
    function=blended_softmax_linear_attention,
    reference=reference.blended_softmax_linear_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "With `r=1` it is softmax attention.",
        "With `r=0` it is normalised linear attention.",
        "The output is affine in `r`.",
    ),
    tests="tests/linear/test_blended_softmax_linear_attention.py",
    cost="With `r=0`, `(Hq * Lq + Hkv * Lk) * F * Dv` multiply-adds; with 1, those of softmax attention; else both.",
)
