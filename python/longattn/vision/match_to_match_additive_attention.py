"""Additive attention: all tokens are summed up into one query and one key, with rotary positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import attention_inputs, flag, mask_scores, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, numbers, returned


def match_to_match_additive_attention(
    q: Array,
    k: Array,
    v: Array,
    w_q: Array,
    w_k: Array,
    w_r: Weights,
    *,
    cos: Array | None = None,
    sin: Array | None = None,
    scale: float | None = None,
    mask: Array | None = None,
    pair_reduce: bool = True,
) -> Array:
    """Attention in linear time through a global query and a global key.

    `a = softmax(s * w_q . q)` over the tokens gives the global query `g = sum a rot(q)`; `p = k * g`, its pairs of
    numbers added up, gives `b = softmax(s * w_k . p)` and the global key `h = sum b rot(k)`; `u = v * h`, pairs added
    up, gives the output `u w_r + q`. Without `pair_reduce`, `p` and `u` keep their width: Fastformer.

    Args:
        q: queries `[B, H, N, D]`, `D` even; float32, float16 or bfloat16.
        k: keys, likewise.
        v: values, likewise.
        w_q: floating `[H, D]`.
        w_k: floating `[H, D / 2]` (`[H, D]` without `pair_reduce`).
        w_r: weights `[D / 2, D]` (`[D, D]`), or a pair `(matrix, bias)`, shared by the heads.
        cos: floating `[N, D / 2]`: cosines of the rotary angles, which turn numbers `2 m` and `2 m + 1`; `None` is no
            turning.
        sin: the sines; both or none.
        scale: factor on the logits; `None` is `D ** -0.5`.
        mask: booleans, broadcastable to `[B, H, N]`: tokens that count in the sums.
        pair_reduce: add up pairs of numbers.

    Returns:
        `[B, H, N, D]`, in the kind and dtype of `q`. An output projection over the heads is the caller's.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `N * D ** 2 / 2` multiply-adds per head: linear in `N`.

    References:
        S. Kim et al., "TransforMatcher: Match-to-Match Attention for Semantic Correspondence", 2022, arXiv:2205.11634.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> q, k, v = rng.standard_normal((3, 1, 2, 81, 8), dtype=np.float32)
        >>> w = rng.standard_normal((2, 8)), rng.standard_normal((2, 4)), rng.standard_normal((4, 8))
        >>> longattn.vision.match_to_match_additive_attention(q, k, v, *w).shape
        (1, 2, 81, 8)
    """
    qn, kn, vn = (np.asarray(x, np.float32) for x in attention_inputs(q, k, v, ranks=(4,)))
    if kn.shape != qn.shape or vn.shape != qn.shape:
        raise ValueError(f"k: got shapes {kn.shape} and {vn.shape} of v, expected {qn.shape} as q")
    _, heads, tokens, dim = qn.shape
    paired = flag(pair_reduce, "pair_reduce")
    if dim % 2:
        raise ValueError(f"q: got head_dim {dim}, expected an even one")
    inner = dim // 2 if paired else dim
    of_q, of_k = numbers(w_q, "w_q", (heads, dim)), numbers(w_k, "w_k", (heads, inner))
    project = Linear.of(w_r, "w_r", inner, dim)
    if (cos is None) != (sin is None):
        raise ValueError("cos: got one of cos and sin, expected both or none")
    angles = None
    if cos is not None and sin is not None:
        angles = numbers(cos, "cos", (tokens, dim // 2)), numbers(sin, "sin", (tokens, dim // 2))
    factor = scale_factor(scale, dim)
    seen = None if mask is None else mask_scores(_of_tokens(mask), (*qn.shape[:2], 1, tokens))
    whole = _pooled(of_q, qn, _turned(qn, angles), factor, seen)
    key = _pooled(of_k, _pairs(kn * whole, paired), _turned(kn, angles), factor, seen)
    return returned(q, project(_pairs(vn * key, paired)) + qn)


def _of_tokens(mask: Array) -> NDArray[Any]:
    """A mask of tokens as one of scores."""
    x = as_numpy(mask, "mask", any_strides=True)
    if not x.ndim:
        raise ValueError("mask: got shape (), expected one that broadcasts to [B, H, N]")
    return x[..., None, :]


def _pooled(w: Float32, keys: Float32, values: Float32, scale: float, mask: NDArray[np.bool_] | None) -> Float32:
    """The mean of values by a softmax of `w . keys`, `[B, H, 1, D]`."""
    query = np.broadcast_to(w[None, :, None], (len(keys), len(w), 1, w.shape[1]))
    out: Float32 = attention(np.ascontiguousarray(query), keys, values, scale=scale, mask=mask)
    return out


def _pairs(x: Float32, paired: bool) -> Float32:
    """Neighbouring numbers added up."""
    return np.ascontiguousarray(x[..., ::2] + x[..., 1::2]) if paired else x


def _turned(x: Float32, angles: Any) -> Float32:
    """Pairs of neighbouring numbers turned by each token's angles."""
    if angles is None:
        return x
    cos, sin = angles
    out = np.empty_like(x)
    out[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 1::2] * cos + x[..., ::2] * sin
    return out


METHOD = Method(
    name="match_to_match_additive_attention",
    family="vision",
    title="TransforMatcher: Match-to-Match Attention for Semantic Correspondence",
    year=2022,
    arxiv="2205.11634",
    function=match_to_match_additive_attention,
    reference=reference.match_to_match_additive_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "One token is its own global query and key.",
        "Without rotary positions permuted tokens give permuted outputs.",
        "With `w_q = 0` the global query is the mean of the turned queries.",
        "Tokens that do not count change nothing.",
    ),
    tests="tests/vision/test_match_to_match_additive_attention.py",
    cost="`N * D ** 2 / 2` multiply-adds per head: linear in `N`.",
)
