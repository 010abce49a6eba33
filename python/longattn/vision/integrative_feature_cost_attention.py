"""Attention that refines features and the costs of matching them at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn._arrays import Array
from longattn._checks import scale_factor
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, features, returned
from longattn.vision.partition import attend


def integrative_feature_cost_attention(
    x: Array,
    cost: Array | None,
    wq: Weights,
    wk: Weights,
    wv: Weights,
    *,
    scale: float | None = None,
) -> tuple[Array, Array | None]:
    """One attention over the places of an image, by features and matching costs, whose weights aggregate both.

    `A = softmax(scale * ([x ; cost] wq) ([x ; cost] wk)^T)`; then `x + A (x wv)` and `cost + A cost`. How wide the
    projections are and whether the attention is linearised is not stated beyond doubt: the widths follow the weights,
    and the attention is a softmax of one head. The other half of a layer is `feature_cost_cross_attention`.

    Args:
        x: features `[B, N, C]`; float32, float16 or bfloat16.
        cost: similarities to the places of the other image `[B, N, M]`, likewise; `None` leaves self-attention.
        wq: query weights `[C + M, D]` (`[C, D]` without costs), or a pair `(matrix, bias)`.
        wk: key weights, likewise.
        wv: value weights `[C, C]`, likewise.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        Features in the shape, kind and dtype of `x`, and costs in those of `cost`, or `None`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `N ** 2 * (D + C + M)` multiply-adds, and the projections.

    References:
        S. Hong et al., "Unifying Feature and Cost Aggregation with Transformers for Semantic and Visual
        Correspondence", 2024, arXiv:2403.11120.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x, cost = (rng.standard_normal((1, 12, n), dtype=np.float32) for n in (8, 16))
        >>> wq, wk = rng.standard_normal((2, 24, 8), dtype=np.float32)
        >>> out, costs = longattn.vision.integrative_feature_cost_attention(x, cost, wq, wk, np.eye(8))
        >>> out.shape, costs.shape
        ((1, 12, 8), (1, 12, 16))
    """
    xn = features(x, "x", 3, "[B, N, C]")
    channels = xn.shape[-1]
    cn = None if cost is None else features(cost, "cost", 3, "[B, N, M]", (*xn.shape[:2], None))
    both = xn if cn is None else np.concatenate([xn, cn], axis=-1)
    q_of = Linear.of(wq, "wq", both.shape[-1])
    k_of = Linear.of(wk, "wk", both.shape[-1], q_of.outputs)
    v_of = Linear.of(wv, "wv", channels, channels)
    values = v_of(xn) if cn is None else np.concatenate([v_of(xn), cn], axis=-1)
    out = attend(q_of(both), k_of(both), values, heads=1, scale=scale_factor(scale, q_of.outputs))
    refined = None if cn is None or cost is None else returned(cost, cn + out[..., channels:])
    return returned(x, xn + out[..., :channels]), refined


def feature_cost_cross_attention(
    source: Array,
    target: Array,
    cost: Array | None,
    wq: Weights,
    wk: Weights,
    wv: Weights,
    *,
    scale: float | None = None,
) -> tuple[Array, Array, Array]:
    """Cross-attention of two images by features and costs, whose logits `L` refine the costs.

    `L = scale * ([source ; cost] wq) ([target ; cost^T] wk)^T`; then `source + softmax(L) (target wv)`,
    `target + softmax(L^T) (source wv)` and `cost + L`.

    Args:
        source: features `[B, N, C]`; float32, float16 or bfloat16.
        target: features of the other image `[B, M, C]`.
        cost: similarities `[B, N, M]`; `None` is cross-attention by features alone, and zeros to add the logits to.
        wq: weights of the source `[C + M, D]` (`[C, D]` without costs), or a pair `(matrix, bias)`.
        wk: weights of the target `[C + N, D]` (`[C, D]`), likewise.
        wv: value weights of both `[C, C]`, likewise.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        Both features in their shapes, kinds and dtypes, and costs in the kind and dtype of `source`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `N * M * (3 * D + 2 * C)` multiply-adds, and the projections. The logits, which are a result, are stored.
    """
    a = features(source, "source", 3, "[B, N, C]")
    channels = a.shape[-1]
    b = features(target, "target", 3, "[B, M, C]", (len(a), None, channels))
    c = None
    if cost is not None:
        c = features(cost, "cost", 3, "[B, N, M]", (len(a), a.shape[1], b.shape[1]))
    one, two = (a, b) if c is None else (_beside(a, c), _beside(b, c.swapaxes(1, 2)))
    q_of = Linear.of(wq, "wq", one.shape[-1])
    k_of = Linear.of(wk, "wk", two.shape[-1], q_of.outputs)
    v_of = Linear.of(wv, "wv", channels, channels)
    factor: Any = np.float32(scale_factor(scale, q_of.outputs))
    q, k = q_of(one), k_of(two)
    logits = factor * (q @ k.swapaxes(1, 2))
    new_a = a + attend(q, k, v_of(b), heads=1, scale=float(factor))
    new_b = b + attend(k, q, v_of(a), heads=1, scale=float(factor))
    return returned(source, new_a), returned(target, new_b), returned(source, logits if c is None else c + logits)


def _beside(x: Float32, cost: Float32) -> Float32:
    return np.concatenate([x, cost], axis=-1)


METHOD = Method(
    name="integrative_feature_cost_attention",
    family="vision",
    title="Unifying Feature and Cost Aggregation with Transformers for Semantic and Visual Correspondence",
    year=2024,
    arxiv="2403.11120",
    function=integrative_feature_cost_attention,
    reference=reference.integrative_feature_cost_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=False,
    step=False,
    checks=(
        "Without costs it is self-attention with a residual, and the other half cross-attention.",
        "Sharp weights on the own place double features and costs.",
        "Features of zeros leave the costs of the other half.",
    ),
    tests="tests/vision/test_integrative_feature_cost_attention.py",
    cost="`N ** 2 * (D + C + M)` multiply-adds, and the projections.",
)
