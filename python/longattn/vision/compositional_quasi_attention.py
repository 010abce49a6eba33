"""Attention whose weights add, subtract and leave out: a tanh of the similarity times a sigmoid of the distance."""

from __future__ import annotations

import numpy as np

from longattn import _core
from longattn._arrays import Array, like
from longattn._checks import batched, dense_inputs, finite, flag, scale_factor
from longattn.dense._options import score_options
from longattn.methods import Method
from longattn.reference import vision as reference


def compositional_quasi_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    scale: float | None = None,
    causal: bool = False,
    mask: Array | None = None,
    centred: bool = False,
    doubled: bool = False,
) -> Array:
    """`sum_j tanh(alpha * s * q_i . k_j) * sigmoid(-beta * s * |q_i - k_j|_1) v_j`, without a softmax.

    Weights lie between -1/2 and 1/2 and are not normalised. Results over parts of the keys simply add up. Which of the
    two options the paper uses, and whether both terms have projections of their own, is not stated beyond doubt; the
    defaults are none of them and shared projections.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`; dtype of `k`.
        alpha: factor of the similarity.
        beta: factor of the distance, at least 0; at 0 distances are not computed.
        scale: factor `s` of both; `None` is `D ** -0.5`.
        causal: query `i` sees keys up to `Lk - Lq + i`.
        mask: booleans, broadcastable to `[B, Hq, Lq, Lk]`; what is not seen weighs 0.
        centred: subtract the mean of a row's distances to the keys that it sees, so that weights reach -1 and 1.
        doubled: twice the sigmoid, so that equal vectors count fully.

    Returns:
        `[B, Hq, Lq, Dv]` in the kind and dtype of `q`; arithmetic is float32. Rows that see nothing give 0.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * Lq * Lk * (D + Dv)` multiply-adds and as many differences as `D` makes, twice those with `centred`.
        Memory: scratch of 192 rows per thread.

    References:
        B. Li, D. Liang, Z. Zhang, "Comateformer: Combined Attention Transformer for Semantic Sentence Matching", 2024,
        arXiv:2412.07220.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 10, 8), dtype=np.float32)
        >>> longattn.vision.compositional_quasi_attention(q, k, v, beta=0.5).shape
        (1, 2, 10, 8)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    factor, keys = scale_factor(scale, qn.shape[-1]), kn.shape[-2]
    similarity, distance = finite(alpha, "alpha"), finite(beta, "beta")
    if distance < 0:
        raise ValueError(f"beta: got {beta}, expected at least 0")
    signed = (similarity * factor, distance * factor, flag(centred, "centred"), flag(doubled, "doubled"))
    options = score_options(qn.shape, keys, span=qn.shape[-2] + keys, causal=causal, mask=mask)
    result = np.zeros((*qn.shape[:-1], vn.shape[-1]), qn.dtype)
    if result.size:
        q4, k4, v4, out4 = (batched(x, 4) for x in (qn, kn, vn, result))
        _core.weighted_attention(q4, k4, v4, out4, options, signed=signed)
    return like(q, result)


METHOD = Method(
    name="compositional_quasi_attention",
    family="vision",
    title="Comateformer: Combined Attention Transformer for Semantic Sentence Matching",
    year=2024,
    arxiv="2412.07220",
    function=compositional_quasi_attention,
    reference=reference.compositional_quasi_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "Without the distance it is half of tanh attention; doubled, all of it.",
        "Queries of zeros give 0.",
        "The opposite values, or without the distance the opposite queries, give the opposite.",
        "Results over parts of the keys add up to that over all.",
        "A key equal to its query, doubled, weighs the tanh of its scaled square.",
    ),
    tests="tests/vision/test_compositional_quasi_attention.py",
    cost="`Hq * Lq * Lk * (2 * D + Dv)` steps.",
)
