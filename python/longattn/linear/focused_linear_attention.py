"""Focused linear attention: powers sharpen the directions of features, a convolution restores rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, finite, one_of
from longattn.linear._global import attend, inputs, map_size, position_shift
from longattn.linear._local import local_values
from longattn.methods import Method
from longattn.reference import linear as reference

#: Added to the features before they are raised to a power.
OFFSET = 1e-6


def focused_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    power: float = 3.0,
    channel_scale: Array | None = None,
    pos: Array | None = None,
    norm_scope: str = "all",
    eps: float = 1e-6,
    dwc_weight: Array | None = None,
    dwc_bias: Array | None = None,
    size: tuple[int, int] | None = None,
    out: Array | None = None,
) -> Any:
    """Linear attention with the map `phi(x) = |x| x^p / |x^p|` of `x = (relu(x) + 1e-6) / softplus(channel_scale)`.

    `o_i = (phi(q_i)^T mean_j phi(k_j) v_j^T) / (phi(q_i)^T mean_j phi(k_j) + eps)`, plus a depthwise convolution of the
    values as a map.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        power: the focusing factor `p`, above 0.
        channel_scale: floating `[H * D]`, learned, before its softplus; takes as many query heads as KV heads. `None`
            is zeros, a division by `ln 2`.
        pos: floating `[Lk, Hkv * D]`, added to the keys.
        norm_scope: "all": lengths in `phi` are over all heads of a token; "head": over each.
        eps: added to the denominator.
        dwc_weight: floating `[Dv, 1, kh, kw]`, shared by the heads, or `[H * Dv, 1, kh, kw]`; takes `size`, and as many
            queries and query heads as keys and KV heads.
        dwc_bias: floating, one number per channel of `dwc_weight`.
        size: height and width of the map that keys and values are.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(Hq * Lq + Hkv * Lk) * D * Dv` multiply-adds, and `H * L * Dv * kh * kw` of the convolution; with "all",
        queries and keys are read once more.

    References:
        D. Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", 2023, arXiv:2308.00442.
    """
    qn, kn, _ = arrays = inputs(q, k, v)
    maps = focusing(qn, kn, power, channel_scale, norm_scope, pos)
    eps = finite(eps, "eps", 0)
    add = local_part(arrays, dwc_weight, dwc_bias, size)
    return attend(q, arrays, maps, ("divide_means", eps, 0.0), add=add, out=out)


def focusing(
    qn: NDArray[Any],
    kn: NDArray[Any],
    power: object,
    channel_scale: Array | None,
    norm_scope: str,
    pos: Array | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The maps of queries and keys of rank 4."""
    exponent = finite(power, "power")
    if exponent <= 0:
        raise ValueError(f"power: got {power}, expected above 0")
    one_of(norm_scope, "norm_scope", ("all", "head"))
    own = norm_scope == "head"
    common: dict[str, Any] = {"map": "relu", "offset": OFFSET, "power": (exponent, own)}
    maps = dict(common), dict(common)
    for x, given in zip((qn, kn), maps, strict=True):
        given["channel_factors"] = _channel_factors(channel_scale, x.shape[1], x.shape[3], kn.shape[1])
    shift = position_shift(pos, kn.shape[1], kn.shape[2], kn.shape[3])
    if shift is not None:
        maps[1]["shift"] = shift
    if not own:
        for x, given in zip((qn, kn), maps, strict=True):
            given["row_factors"] = _lengths_kept(x, given)
    return maps


def local_part(
    arrays: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    weight: Array | None,
    bias: Array | None,
    size: tuple[int, int] | None,
    first: int = 0,
) -> NDArray[np.float32] | None:
    """The convolution of the values, for methods that add it to the output of the same token."""
    qn, kn, vn = arrays
    if weight is None:
        if size is not None:
            map_size(size, vn.shape[2] - first)
        return local_values(vn, weight, bias, (0, 0))
    if qn.shape[1:3] != kn.shape[1:3]:
        raise ValueError(
            f"dwc_weight: got weights with {qn.shape[1]} heads of {qn.shape[2]} queries, expected the "
            f"{kn.shape[1]} heads of {kn.shape[2]} keys"
        )
    if size is None:
        raise ValueError("size: got None with dwc_weight, expected the height and width of the map")
    return local_values(vn, weight, bias, map_size(size, vn.shape[2] - first), first)


def _channel_factors(scale: Array | None, heads: int, dim: int, kv_heads: int) -> NDArray[np.float32]:
    """`1 / softplus(scale)` as `[H, D]`."""
    if scale is None:
        return np.full((heads, dim), 1 / np.log(2.0), np.float32)
    x = as_numpy(scale, "channel_scale")
    check_floating(x, "channel_scale")
    if heads != kv_heads:
        raise ValueError(f"channel_scale: got one with {heads} query heads, expected {kv_heads} as in k")
    if x.shape != (heads * dim,):
        raise ValueError(f"channel_scale: got shape {x.shape}, expected {(heads * dim,)}")
    return (1 / np.logaddexp(0.0, x.astype(np.float64))).reshape(heads, dim).astype(np.float32)


def _lengths_kept(x: NDArray[Any], given: dict[str, Any]) -> NDArray[np.float32]:
    """`|x| / |x^p|` over all heads of each token, as `[B, H, L]`."""
    before, after = (
        n.reshape(x.shape[:3]).astype(np.float64).sum(axis=1, keepdims=True) for n in _core.feature_norms(x, given)
    )
    ratio = np.divide(np.sqrt(before), np.sqrt(after), out=np.zeros_like(before), where=after > 0)
    return np.ascontiguousarray(np.broadcast_to(ratio, x.shape[:3]), np.float32)


METHOD = Method(
    name="focused_linear_attention",
    family="linear",
    title="FLatten Transformer: Vision Transformer using Focused Linear Attention",
    year=2023,
    arxiv="2308.00442",
    function=focused_linear_attention,
    reference=reference.focused_linear_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "The map keeps the length of what it maps.",
        "With power 1 it is ReLU linear attention of the scaled inputs.",
        "Without the convolution, rows sum to 1 but for `eps`.",
        "A positive factor on the features of queries changes nothing.",
    ),
    tests="tests/linear/test_focused_linear_attention.py",
    cost="`(Hq * Lq + Hkv * Lk) * D * Dv` multiply-adds, and `H * L * Dv * kh * kw` of the convolution.",
)
