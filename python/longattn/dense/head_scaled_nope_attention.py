"""Attention without positions, with a temperature per head that keeps long contexts in focus."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import attention_inputs, check_heads, finite, items_of, per_head, real, scale_factor, shape_of
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import dense as reference


def head_scaled_nope_attention(
    q: Array,
    k: Array,
    v: Array,
    lam: float | Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Attention of a model without positional encoding, `softmax(lam_h * scale * q k^T) v`.

    There is no rotation and no bias: what a query sees is a set. As the set grows beyond the training length the
    softmax spreads; factors `lam` above 1 draw it together again, one per head (HeadScale) or one for all
    (UniformScale, 1.2 say). `matching_lam` finds them.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16; not rotated.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes; not rotated.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        lam: floating `[Hq]`, or one number for all heads. Multiplied in float32.
        causal: as in `longattn.attention`.
        scale: the factor that `lam` multiplies; `None` is `D ** -0.5`.
        options: other options of `longattn.attention`, such as `window`, `mask`, `return_lse` and `out`.

    Returns:
        As `longattn.attention`: the output in the kind and dtype of `q`, with `return_lse` the pair with lse.

    Raises:
        TypeError: as `longattn.attention`.
        ValueError: as `longattn.attention`, and `lam` of another shape.

    Cost:
        That of `longattn.attention`.

    References:
        J. Wang et al., "Length Generalization of Causal Transformers without Position Encoding", 2024,
        arXiv:2404.12224.

    Example:
        >>> import numpy as np, longattn as la
        >>> q = k = v = np.ones((1, 2, 10, 64), np.float32)
        >>> la.dense.head_scaled_nope_attention(q, k, v, np.array([1.0, 1.3])).shape
        (1, 2, 10, 64)
    """
    shape = shape_of(q, "q")
    if len(shape) not in (3, 4):
        raise ValueError(f"q: got shape {shape}, expected rank 3 or 4")
    factors = _factors(lam, "lam", shape[-3]) * np.float32(scale_factor(scale, max(1, shape[-1])))
    return attention(q, k, v, causal=causal, scale=factors, **options)


def matching_lam(
    q: Array,
    k: Array,
    target: float | Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    bounds: tuple[float, float] = (0.125, 8.0),
    tolerance: float = 1e-3,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factors `lam` with which each head's mean entropy over these queries is `target`.

    A search in place of the paper's tuning by gradients: take `target` from the lengths that the model was trained
    on (the entropy that this function returns for `bounds=(1, 1)`), `q` and `k` from the length that it is to work
    at. Entropy falls as `lam` grows, so bisection finds it, for all heads at once.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        target: mean entropy wanted, in nats: floating `[Hq]`, or one number for all heads.
        causal: as in `longattn.attention`.
        scale: the factor that `lam` multiplies; `None` is `D ** -0.5`.
        bounds: least and greatest factor, both positive. A head whose target lies outside what they give gets the
            nearer bound.
        tolerance: how far, in nats, a head's entropy may be from its target.

    Returns:
        The pair `(lam, entropy)`, float32 `[Hq]` each: the factors and the mean entropy that each head then has,
        from which one sees where a target was out of reach.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, no queries, a target below 0, bounds that are not positive and ascending,
            or a tolerance that is not positive.

    Cost:
        At most 24 passes of attention with values as wide as the keys.
    """
    qn, kn, _ = attention_inputs(q, k, k, ranks=(3, 4))
    heads, dim = qn.shape[-3], qn.shape[-1]
    check_heads(heads, kn.shape[-3], kn.shape[-3])
    if 0 in (*qn.shape, *kn.shape):
        raise ValueError(f"q: got shape {qn.shape} with keys {kn.shape}, expected queries and keys")
    wanted = _factors(target, "target", heads)
    if not (wanted >= 0).all():
        raise ValueError(f"target: got {wanted.min()}, expected at least 0")
    ends = [real(bound, "bounds") for bound in items_of(bounds, "bounds", "two numbers")]
    if len(ends) != 2:
        raise ValueError(f"bounds: got {len(ends)} numbers, expected two")
    least, greatest = ends
    if not 0 < least <= greatest < np.inf:
        raise ValueError(f"bounds: got {bounds!r}, expected 0 < least <= greatest")
    if not real(tolerance, "tolerance") > 0:
        raise ValueError(f"tolerance: got {tolerance}, expected a positive number")
    factor, q32 = scale_factor(scale, dim), qn.astype(np.float32, copy=False)

    def entropy(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        return _mean_entropy(q32, kn, (factor * np.exp(logs)).astype(np.float32), causal)

    low, high = np.full(heads, np.log(least)), np.full(heads, np.log(greatest))
    at_low, at_high = entropy(low), entropy(high)
    # The bound itself where the target is out of reach; else the middle of what is left.
    logs = np.where(wanted >= at_low, low, high)
    reached = np.where(wanted >= at_low, at_low, at_high)
    open_heads = (wanted < at_low) & (wanted > at_high)
    for _ in range(22):
        if not open_heads.any():
            break
        middle = np.where(open_heads, (low + high) / 2, logs)
        at_middle = entropy(middle)
        logs, reached = np.where(open_heads, middle, logs), np.where(open_heads, at_middle, reached)
        low, high = np.where(at_middle > wanted, middle, low), np.where(at_middle > wanted, high, middle)
        open_heads &= np.abs(at_middle - wanted) > tolerance
    return np.exp(logs).astype(np.float32), reached.astype(np.float32)


def _mean_entropy(q: NDArray[Any], k: NDArray[Any], scale: NDArray[np.float32], causal: bool) -> NDArray[np.float64]:
    """Mean of each head's entropy `lse - sum_j w_j s_j` over the rows, of all batches, that see a key."""
    # With the keys as values, the output `o` is the mean key, and `q . o` the mean of `q . k`.
    o, lse = attention(q, k, k, causal=causal, scale=scale, return_lse=True)
    mean_logit = scale[:, None] * np.einsum("...d,...d->...", q, o)
    seeing = np.isfinite(lse)
    of_rows = np.where(seeing, lse, 0.0) - mean_logit  # both 0 where nothing is seen
    axes = tuple(axis for axis in range(lse.ndim) if axis != lse.ndim - 2)
    total: NDArray[np.float64] = of_rows.sum(axis=axes, dtype=np.float64)
    mean: NDArray[np.float64] = total / np.maximum(seeing.sum(axis=axes), 1)
    return mean


def _factors(values: float | Array, name: str, heads: int) -> NDArray[np.float32]:
    """One number per query head, from an array or one number for all."""
    one = np.ndim(values) == 0
    factors = np.full(heads, finite(values, name), np.float32) if one else per_head(values, name, heads)
    if not np.isfinite(factors).all():
        raise ValueError(f"{name}: got {values}, expected finite numbers")
    return factors


METHOD = Method(
    name="head_scaled_nope_attention",
    family="position",
    title="Length Generalization of Causal Transformers without Position Encoding",
    year=2024,
    arxiv="2404.12224",
    function=head_scaled_nope_attention,
    reference=reference.head_scaled_nope_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "`lam = 1` is attention without positions.",
        "The last row of causal attention does not change when the earlier keys and values are permuted.",
        "A large `lam` gives the value of the best key, `lam = 0` the mean of the visible values.",
        "Queries multiplied by `lam` beforehand give the same.",
    ),
    tests="tests/dense/test_head_scaled_nope_attention.py",
    cost="That of attention.",
)
