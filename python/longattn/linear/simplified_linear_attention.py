"""Simplified linear attention, and the normalisation that goes with it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_float_storage, check_floating, finite
from longattn.linear._global import attend, inputs, position_shift
from longattn.linear.focused_linear_attention import local_part
from longattn.methods import Method
from longattn.reference import linear as reference


def simplified_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    pos: Array | None = None,
    eps: float = 1e-6,
    dwc_weight: Array | None = None,
    dwc_bias: Array | None = None,
    size: tuple[int, int] | None = None,
    mask: Array | None = None,
    out: Array | None = None,
) -> Any:
    """`relu(q_i)^T S / (relu(q_i)^T z + eps)`, `S = sum_j relu(k_j) v_j^T`, plus a depthwise convolution of the values.

    Keys are always summed up first, also where few tokens would make the other order of products cheaper. A query whose
    features meet none of the keys' gets 0 (and its convolution).

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        pos: floating `[Lk, Hkv * D]`, added to the keys before the ReLU.
        eps: added to the denominator.
        dwc_weight: floating `[Dv, 1, kh, kw]`, shared by the heads, or `[H * Dv, 1, kh, kw]`; takes `size`, and as many
            queries and query heads as keys and KV heads.
        dwc_bias: floating, one number per channel of `dwc_weight`.
        size: height and width of the map that keys and values are.
        mask: boolean `[Lk]` or `[B, Lk]`; True lets the key count (not in the convolution).
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(Hq * Lq + Hkv * Lk) * D * Dv` multiply-adds, and `H * L * Dv * kh * kw` of the convolution.

    References:
        J. Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized
        Batch Normalization", 2024, arXiv:2405.11582.
    """
    _, kn, _ = arrays = inputs(q, k, v)
    of_keys: dict[str, Any] = {"map": "relu"}
    shift = position_shift(pos, kn.shape[1], kn.shape[2], kn.shape[3])
    if shift is not None:
        of_keys["shift"] = shift
    eps = finite(eps, "eps", 0)
    add = local_part(arrays, dwc_weight, dwc_bias, size)
    return attend(q, arrays, ({"map": "relu"}, of_keys), ("divide", eps, 0.0), mask=mask, add=add, out=out)


def fold_rep_batch_norm(
    mean: Array, var: Array, gamma: Array, beta: Array, *, alpha: float = 1.0, eps: float = 1e-5
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factors and shifts of the channels that batch normalisation and its scaled shortcut come to.

    Args:
        mean: running mean, floating `[C]`.
        var: running variance, floating `[C]`, at least 0.
        gamma: factors, floating `[C]`.
        beta: shifts, floating `[C]`.
        alpha: factor of the shortcut.
        eps: added to the variance.

    Returns:
        `(gamma / sqrt(var + eps) + alpha, beta - mean * gamma / sqrt(var + eps))`, float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that differ, or a negative variance.

    Cost:
        A few operations per channel.
    """
    arrays: list[NDArray[np.float64]] = []
    for x, name in ((mean, "mean"), (var, "var"), (gamma, "gamma"), (beta, "beta")):
        a = as_numpy(x, name)
        check_floating(a, name)
        if a.ndim != 1 or (arrays and a.shape != arrays[0].shape):
            raise ValueError(f"{name}: got shape {a.shape}, expected {arrays[0].shape if arrays else '[C]'}")
        arrays.append(a.astype(np.float64))
    means, variances, factors, shifts = arrays
    if (variances < 0).any():
        raise ValueError("var: got a negative variance, expected at least 0")
    slope = factors / np.sqrt(variances + finite(eps, "eps", 0))
    return (slope + finite(alpha, "alpha")).astype(np.float32), (shifts - means * slope).astype(np.float32)


def rep_batch_norm(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array,
    beta: Array,
    *,
    alpha: float = 1.0,
    eps: float = 1e-5,
    blend: float = 0.0,
    layer_gamma: Array | None = None,
    layer_beta: Array | None = None,
) -> Array:
    """Batch normalisation with a shortcut, blended with layer normalisation: `b LN(x) + (1 - b) (BN(x) + alpha x)`.

    At inference `blend` is 0 and all of it is one factor and one shift per channel (`fold_rep_batch_norm`), which fold
    into the next projection. During training the blend falls from 1 to 0.

    Args:
        x: tokens `[..., C]`; float32, float16 or bfloat16.
        mean: running mean, floating `[C]`.
        var: running variance, floating `[C]`.
        gamma: factors, floating `[C]`.
        beta: shifts, floating `[C]`.
        alpha: factor of the shortcut.
        eps: added to variances.
        blend: `b`, 0 to 1.
        layer_gamma: factors of the layer normalisation, floating `[C]`; `None` is 1.
        layer_beta: its shifts; `None` is 0.

    Returns:
        An array like `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        A few operations per number.
    """
    xn = as_numpy(x, "x")
    check_float_storage(xn, "x")
    factor, shift = fold_rep_batch_norm(mean, var, gamma, beta, alpha=alpha, eps=eps)
    if xn.ndim == 0 or xn.shape[-1:] != factor.shape:
        raise ValueError(f"x: got shape {xn.shape}, expected [..., {factor.size}]")
    share = finite(blend, "blend")
    if not 0 <= share <= 1:
        raise ValueError(f"blend: got {blend}, expected 0 to 1")
    wide = xn.astype(np.float32, copy=False)
    found = wide * factor + shift
    own = []
    for given, name, default in ((layer_gamma, "layer_gamma", 1.0), (layer_beta, "layer_beta", 0.0)):
        a = np.full(factor.shape, default, np.float32) if given is None else as_numpy(given, name)
        check_floating(a, name)
        if a.shape != factor.shape:
            raise ValueError(f"{name}: got shape {a.shape}, expected {factor.shape}")
        own.append(a.astype(np.float32))
    if share:
        centred = wide - wide.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(eps))
        found = share * (centred / deviation * own[0] + own[1]) + (1 - share) * found
    return like(x, found.astype(xn.dtype, copy=False))


METHOD = Method(
    name="simplified_linear_attention",
    family="linear",
    title="SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch "
    "Normalization",
    year=2024,
    arxiv="2405.11582",
    function=simplified_linear_attention,
    reference=reference.simplified_linear_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "It is the product in the other order, `(relu(q) relu(k)^T) v`.",
        "A blend of 1 is layer normalisation, a blend of 0 batch normalisation with its shortcut.",
        "The folded factor and shift are batch normalisation plus the scaled input.",
        "Without the convolution, rows of positive queries and keys sum to 1.",
    ),
    tests="tests/linear/test_simplified_linear_attention.py",
    cost="`(Hq * Lq + Hkv * Lk) * D * Dv` multiply-adds, and `H * L * Dv * kh * kw` of the convolution.",
)
