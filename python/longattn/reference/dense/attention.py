"""Exact attention from its formula: float64 numpy with materialised scores.

Arguments are those of `longattn.attention`, `longattn.attention_varlen` and `longattn.merge`, as numpy arrays
(bfloat16 by ml_dtypes); results are float64. Nothing is checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: ArrayLike | None = None,
    softcap: float = 0.0,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    relative_bias: ArrayLike | None = None,
    relative_zero: int | None = None,
    segments: tuple[ArrayLike, ArrayLike] | None = None,
    visible_until: ArrayLike | None = None,
    skip_threshold: float = 0.0,
    state: tuple[ArrayLike, ArrayLike] | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention; see `longattn.attention`. `skip_threshold` leaves out nothing here.

    Returns:
        Output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), with `return_lse` the pair with lse `[B, Hq, Lq]` (or
        `[Hq, Lq]`).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads, rows, dim = q.shape[-3:]
    kv_heads, keys = k.shape[-3:-1]
    k, v = (np.repeat(x, heads // kv_heads, axis=-3) for x in (k, v))

    with np.errstate(invalid="ignore", over="ignore"):
        s = row_factors(dim**-0.5 if scale is None else scale) * (q @ k.swapaxes(-1, -2))
        if softcap:
            s = softcap * np.tanh(s / softcap)
        distance = (np.arange(rows) + keys - rows)[:, None] - np.arange(keys)  # query position - key position
        if alibi_slopes is not None:
            s = s - np.asarray(alibi_slopes, np.float64)[..., None, None] * np.abs(distance)
        if relative_bias is not None:
            table = np.asarray(relative_bias, np.float64)
            last = table.shape[1] - 1
            s = s + table[:, np.clip((last if relative_zero is None else relative_zero) - distance, 0, last)]
        if bias is not None:
            s = s + np.asarray(bias, np.float64)

        visible = np.broadcast_to(visible_keys(distance, causal, window), s.shape)
        if mask is not None:
            visible = visible & np.asarray(mask)
        if segments is not None:
            own, of_keys = (np.asarray(ids) for ids in segments)
            visible = visible & over_heads(own[..., :, None] == of_keys[..., None, :])
        if visible_until is not None:
            position = np.arange(rows)[:, None] + keys - rows
            visible = visible & over_heads(position < np.asarray(visible_until)[..., None, :])
        s = np.where(visible, s, -np.inf)

        # The sink is one more logit of every row, without a value.
        sink = np.full((heads, 1), -np.inf) if sinks is None else np.asarray(sinks, np.float64)[:, None]
        top = np.maximum(s.max(axis=-1, initial=-np.inf), sink)
        top = np.where(top == -np.inf, 0.0, top)
        p = np.where(visible, np.exp(s - top[..., None]), 0.0)
        total = p.sum(axis=-1) + np.exp(sink - top)
        out = weighted_values(p, v, visible) / np.where(total == 0, 1.0, total)[..., None]
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    if state is not None:
        out, lse = merge([state, (out, lse)])
    return (out, lse) if return_lse else out


def row_factors(scale: ArrayLike) -> Float64:
    """A factor, or one per head `[Hq]` or query row `[(B,) Hq, Lq]`, as it multiplies scores `[B, Hq, Lq, Lk]`."""
    factors = np.asarray(scale, np.float64)
    if factors.ndim == 0:
        return factors
    return factors[:, None, None] if factors.ndim == 1 else factors[..., None]


def over_heads(seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[Lq, Lk]` or `[B, Lq, Lk]` as it goes with scores `[B, Hq, Lq, Lk]`."""
    return seen if seen.ndim == 2 else seen[:, None]


def visible_keys(distance: NDArray[np.int64], causal: bool, window: tuple[int, int]) -> NDArray[np.bool_]:
    """Which keys `causal` and `window` let a query see, from `query position - key position` `[Lq, Lk]`."""
    left, right = window
    visible = np.ones_like(distance, dtype=bool)
    if causal:
        visible &= distance >= 0
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= distance >= -right
    return visible


def weighted_values(p: Float64, v: Float64, visible: NDArray[np.bool_]) -> Float64:
    """`p @ v` in which only visible values count: `0 * nan` of a masked key is 0, of a visible key NaN."""
    finite = np.where(np.isfinite(v), v, 0.0)
    out: Float64 = p @ finite
    for j in np.unique(np.nonzero(~np.isfinite(v))[-2]):
        rest = p[..., j, None] * (v - finite)[..., None, j, :]  # inf - 0 and nan - 0; 0 where finite
        out += np.where(visible[..., j, None], rest, 0.0)
    return out


def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    state: tuple[ArrayLike, ArrayLike] | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """`attention` of each packed sequence; see `longattn.attention_varlen`.

    Returns:
        Output `[Tq, Hq, Dv]`, with `return_lse` the pair with lse `[Hq, Tq]`.
    """
    q, k, v = (np.asarray(x, np.float64).swapaxes(0, 1) for x in (q, k, v))  # [H, T, D]
    out = np.empty((*q.shape[:2], v.shape[-1]))
    lse = np.empty(q.shape[:2])
    bounds_q, bounds_k = np.asarray(cu_seqlens_q), np.asarray(cu_seqlens_k)
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        part = attention(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], return_lse=True, **options)
        if state is not None:
            part = merge([(np.asarray(state[0])[q0:q1].swapaxes(0, 1), np.asarray(state[1])[:, q0:q1]), part])
        out[:, q0:q1], lse[:, q0:q1] = part
    packed = out.swapaxes(0, 1)
    return (packed, lse) if return_lse else packed


def merge(parts: Iterable[tuple[ArrayLike, ArrayLike]]) -> tuple[Float64, Float64]:
    """Attention over the union of disjoint sets of keys; see `longattn.merge`.

    Returns:
        The pair `(o, lse)`.
    """
    pairs = list(parts)
    o = np.stack([np.asarray(o, np.float64) for o, _ in pairs])
    lses = np.stack([np.asarray(lse, np.float64) for _, lse in pairs])
    top = lses.max(axis=0)
    top = np.where(top == -np.inf, 0.0, top)
    weights = np.exp(lses - top)
    total = weights.sum(axis=0)
    counted = np.where(lses[..., None] == -np.inf, 0.0, o)
    out = (weights[..., None] * counted).sum(axis=0) / np.where(total == 0, 1.0, total)[..., None]
    with np.errstate(divide="ignore"):
        return out, top + np.log(total)
