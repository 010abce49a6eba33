"""InLine attention: linear attention normalised by subtraction."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, reshaped
from longattn._checks import check_float_storage, check_floating, integer, scale_factor
from longattn.linear._global import attend, inputs
from longattn.linear.feature_map import FeatureMap, feature_map, parts
from longattn.linear.focused_linear_attention import local_part
from longattn.methods import Method
from longattn.reference import linear as reference


def inline_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    phi: str | FeatureMap = "identity",
    scale: float | None = None,
    local_weights: Array | None = None,
    size: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    mask: Array | None = None,
    out: Array | None = None,
) -> Any:
    """Weights `s phi(q_i)^T phi(k_j) / n - m_i / n + 1 / n`, `m_i = s phi(q_i)^T mean_j phi(k_j)`.

    Rows sum to 1, entries may be negative, and different queries get different rows, which a division by the sum does
    not grant.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        phi: the map of queries and keys, or its name.
        scale: the factor `s`; `None` is `D ** -0.5`.
        local_weights: floating `[B, H * Dv, kh, kw]`: each sample's own depthwise convolution of the values, which is
            added; `inline_local_weights` makes them. Takes `size`, and as many queries and query heads as keys and KV
            heads.
        size: height and width of the map that keys and values are.
        prefix_tokens: tokens in front of the map (a class token), which the convolution leaves out.
        mask: boolean `[Lk]` or `[B, Lk]`; True lets the key count (not in the convolution).
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; zeros without keys.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(Hq * Lq + Hkv * Lk) * F * Dv` multiply-adds, and `H * L * Dv * kh * kw` of the convolution.

    References:
        D. Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", 2024, arXiv:2412.06590.
    """
    qn, kn, _ = arrays = inputs(q, k, v)
    chosen = feature_map(phi)
    dim = qn.shape[3]
    maps = parts(chosen, qn.shape[1], dim, keys=False), parts(chosen, kn.shape[1], dim, keys=True)
    factor = scale_factor(scale, dim)
    first = integer(prefix_tokens, "prefix_tokens", 0, kn.shape[2])
    add = local_part(arrays, local_weights, None, size, first)
    return attend(q, arrays, maps, ("subtract", factor, 0.0), mask=mask, add=add, out=out)


def inline_local_weights(x: Array, w1: Array, w2: Array, *, groups: int = 1) -> NDArray[np.float32]:
    """The convolution of each sample, `W2 gelu(W1 mean_i x_i)`, for `inline_attention`.

    Args:
        x: tokens `[B, L, C]`, without class token; float32, float16 or bfloat16.
        w1: floating `[hidden, C / groups]`: 1 x 1 convolution, its outputs dealt to the groups in order.
        w2: floating `[C * 9, hidden / groups]`, likewise.
        groups: groups of both (the heads).

    Returns:
        float32 `[B, C, 3, 3]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        `B * (L * C + hidden * C / groups * 10)` operations.
    """
    xn, first, second = as_numpy(x, "x"), as_numpy(w1, "w1"), as_numpy(w2, "w2")
    check_float_storage(xn, "x")
    check_floating(first, "w1")
    check_floating(second, "w2")
    if xn.ndim != 3 or xn.shape[1] == 0:
        raise ValueError(f"x: got shape {xn.shape}, expected [B, L, C] with at least one token")
    n, channels = integer(groups, "groups", 1), xn.shape[2]
    if channels % n or first.ndim != 2 or first.shape[1] * n != channels or first.shape[0] % n:
        raise ValueError(f"w1: got shape {first.shape}, expected [hidden, {channels} / {n}], hidden a multiple of {n}")
    hidden = first.shape[0]
    if second.shape != (channels * 9, hidden // n):
        raise ValueError(f"w2: got shape {second.shape}, expected {(channels * 9, hidden // n)}")
    mean = xn.mean(axis=1, dtype=np.float64)
    inner = _grouped(mean, first.astype(np.float64), n)
    inner = 0.5 * inner * (1 + _erf(inner / np.sqrt(2)))
    found = _grouped(inner, second.astype(np.float64), n)
    return found.reshape(len(xn), channels, 3, 3).astype(np.float32)


def _grouped(x: NDArray[np.float64], w: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    """A 1 x 1 convolution in groups of `[B, C]`."""
    parts_of_x = reshaped(x, len(x), groups, -1)
    parts_of_w = reshaped(w, groups, -1, w.shape[1])
    found: NDArray[np.float64] = reshaped(np.einsum("bgc,goc->bgo", parts_of_x, parts_of_w), len(x), -1)
    return found


def _erf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error function, of a few numbers."""
    from math import erf

    return np.array([erf(value) for value in x.reshape(-1)]).reshape(x.shape)


METHOD = Method(
    name="inline_attention",
    family="linear",
    title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    year=2024,
    arxiv="2412.06590",
    function=inline_attention,
    reference=reference.inline_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "Rows sum to 1.",
        "The factored form is the direct one.",
        "A query of zeros gives the mean value.",
        "A query and its double give different rows.",
        "Keys with mean 0 give `s q K^T V / n` plus the mean value.",
    ),
    tests="tests/linear/test_inline_attention.py",
    cost="`(Hq * Lq + Hkv * Lk) * F * Dv` multiply-adds, and `H * L * Dv * kh * kw` of the convolution.",
)
