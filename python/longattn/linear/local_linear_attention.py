"""Local linear attention: an affine fit around each query under the softmax weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import (
    arithmetic,
    batched,
    check_floating,
    dense_inputs,
    finite,
    flag,
    integer,
    real,
    result_array,
    returned,
    scale_factor,
)
from longattn.dense.attention import attention
from longattn.dense.attention_backward import attention_backward
from longattn.methods import Method
from longattn.reference import linear as reference

#: The least `1 - mu . rho`.
FLOOR = 1e-6


@dataclass(frozen=True, slots=True)
class LocalLinearStats:
    """What the conjugate gradients did.

    Attributes:
        steps: the steps that were taken, each a pass over queries and keys.
        residual: the largest `|mu - Sigma rho| / |mu|` of a row.
    """

    steps: int
    residual: float


def local_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    ridge: float | Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    steps: int | None = None,
    tolerance: float = 1e-4,
    return_stats: bool = False,
    out: Array | None = None,
) -> Any:
    """The value at each query of the affine map fitted to keys and values under the softmax weights `p_ij`.

    With `z_ij = k_j - q_i`, `mu_i = sum_j p_ij z_ij`, `Sigma_i = sum_j p_ij z_ij z_ij^T + ridge I` and
    `rho_i = Sigma_i^-1 mu_i`, the output is `sum_j p_ij (1 - z_ij . rho_i) v_j / (1 - mu_i . rho_i)`. Weights may be
    negative and sum to 1. `rho` is found by conjugate gradients without any matrix: `Sigma x` of all queries is one
    pass of attention's backward kernel over queries and keys. Queries and keys must live in one space (rotate both, or
    neither).

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, or all of `q`, `k` and `v` float64.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        ridge: above 0; a number, or floating `[Hq]`, `[Hq, Lq]` or `[B, Hq, Lq]`. It is added to the matrix of the
            normalised weights. The paper states it for weights that are not, which would depend on the largest logit.
        causal: a query sees only keys at its own position and before.
        scale: factor on the logits, not 0; `None` is `D ** -0.5`.
        steps: the most steps of conjugate gradients; `None` is `min(D, 16)`. More where the keys spread unevenly.
        tolerance: a row is done when its residual is this share of what it began with.
        return_stats: also return what the iteration did.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; zeros in a row without keys.
        With `return_stats`, a pair with `LocalLinearStats`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        A forward pass of attention, up to `steps` backward ones, and one with `D + Dv` channels. Memory: a few arrays
        like `q`, `k` and `v`.

    References:
        Y. Zuo et al., "Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time
        Regression", 2025, arXiv:2510.01450.
    """
    qn, kn, vn = dense_inputs(q, k, v)
    dtype = arithmetic(qn)
    dim, value_dim = qn.shape[-1], vn.shape[-1]
    factor = scale_factor(scale, dim)
    if factor == 0:
        raise ValueError("scale: got 0, expected another number")
    causal, return_stats = flag(causal, "causal"), flag(return_stats, "return_stats")
    most = min(dim, 16) if steps is None else integer(steps, "steps", 1)
    target = real(tolerance, "tolerance")
    if not 0 <= target < 1:
        raise ValueError(f"tolerance: got {tolerance}, expected 0 to below 1")
    result = result_array(out, q, (*qn.shape[:-1], value_dim), qn.dtype, {"q": qn, "k": kn, "v": vn})
    x, keys, values = (np.ascontiguousarray(batched(a, 4), dtype) for a in (qn, kn, vn))
    ridges = _ridges(ridge, x.shape[:3], dtype)[..., None]
    out4 = batched(result, 4)
    if not x.size or not keys.shape[2]:
        out4[...] = 0
        stats = LocalLinearStats(0, 0.0)
        return _found(out, q, result, stats, return_stats)

    options: dict[str, Any] = {"causal": causal, "scale": factor}
    both, lse = attention(x, keys, np.concatenate([keys, values], axis=-1), return_lse=True, **options)
    seen = np.isfinite(lse)[..., None]
    mean, plain = both[..., :dim], both[..., dim:]
    mu = np.where(seen, mean - x, 0)

    def applied(direction: NDArray[Any]) -> NDArray[Any]:
        """`Sigma` times a direction per query."""
        # Of the backward pass only the queries' part counts: with queries as "outputs", delta is their product.
        pulled, _, _ = attention_backward(direction, x, keys, keys, x, lse, **options)
        total = (direction * (mean - x)).sum(axis=-1, keepdims=True)
        image: NDArray[Any] = pulled / factor - total * x + ridges * direction
        return image

    rho, rest = np.zeros_like(mu), mu.copy()
    direction, size = mu.copy(), _dot(mu, mu)
    goal, done = target**2 * size, 0
    for _ in range(most):
        active = size > goal
        if not active.any():
            break
        image = applied(direction)
        bend = _dot(direction, image)
        step = np.where(active & (bend > 0), size / np.where(bend > 0, bend, 1), 0).astype(dtype)
        rho += step * direction
        rest -= step * image
        now = _dot(rest, rest)
        direction = rest + np.where(active & (size > 0), now / np.where(size > 0, size, 1), 0) * direction
        size = np.where(active, now, size)
        done += 1

    wide_keys = np.concatenate([keys, values], axis=-1)
    wide_queries = np.concatenate([x, np.zeros((*x.shape[:-1], value_dim), dtype)], axis=-1)
    zeros = np.zeros_like(x)
    pulled, _, _ = attention_backward(rho, wide_queries, wide_keys, keys, zeros, lse, **options)
    weighted = pulled[..., dim:] / factor
    below = np.maximum(1 - _dot(mu, rho), FLOOR)
    found = ((1 + _dot(x, rho)) * plain - weighted) / below
    out4[...] = np.where(seen, found, 0)
    start = _dot(mu, mu)
    share = np.sqrt(np.divide(size, start, out=np.zeros_like(size), where=start > 0)).max(initial=0.0)
    return _found(out, q, result, LocalLinearStats(done, float(share)), return_stats)


def _found(out: Array | None, q: Array, result: NDArray[Any], stats: LocalLinearStats, wanted: bool) -> Any:
    output = returned(out, q, result, None)
    return (output, stats) if wanted else output


def _dot(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    product: NDArray[Any] = np.einsum("...d,...d->...", a, b)[..., None]
    return product


def _ridges(ridge: float | Array, rows: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The ridge of each query, `[B, Hq, Lq]`."""
    if isinstance(ridge, int | float):
        x = np.asarray(finite(ridge, "ridge"), np.float64)
    else:
        x = as_numpy(ridge, "ridge", any_strides=True)
        check_floating(x, "ridge")
        if x.shape not in (rows[1:2], rows[1:], rows):
            raise ValueError(f"ridge: got shape {x.shape}, expected {rows[1:2]}, {rows[1:]} or {rows}")
        if x.ndim == 1:
            x = x[:, None]
    if not (np.isfinite(x) & (x > 0)).all():
        raise ValueError("ridge: got numbers that are not above 0, or not finite, expected positive ones")
    return np.broadcast_to(x.astype(dtype), rows)


METHOD = Method(
    name="local_linear_attention",
    family="score",
    title="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression",
    year=2025,
    arxiv="2510.01450",
    function=local_linear_attention,
    reference=reference.local_linear_attention,
    exact=False,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    dtypes=("float32", "float16", "bfloat16", "float64"),
    checks=(
        "With a large ridge it is softmax attention.",
        "Values that are affine in the keys are continued to the query, as the ridge goes to 0.",
        "With a small scale and ridge it is least squares, evaluated at the query.",
        "Queries may come one by one.",
        "Equal values return that value.",
    ),
    tests="tests/linear/test_local_linear_attention.py",
    cost="`steps + 2` passes of `Hq * Lq * Lk * D` to `4 * D` multiply-adds.",
)
