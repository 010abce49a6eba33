"""Neighbourhood attention from its rule: float64 numpy with a materialised mask, one token at a time."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention


def window_tokens(x: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """The tokens that token `x` of an axis sees."""
    members = list(range(x % dilation, length, dilation))
    u, last = x // dilation, len(members) - 1
    if causal:
        leader = min(stride * (u // stride) + stride - 1, last)
        return members[max(leader - window + 1, 0) : u + 1]
    left, right = window // 2, window - 1 - window // 2
    leader = min(stride * (u // stride) + stride // 2, last)
    centre = min(max(leader, left), last - right)
    return [members[centre + offset] for offset in range(-left, right + 1)]


def spread(value: Any, axes: int) -> tuple[Any, ...]:
    """One per axis."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * axes


def neighborhood_mask(
    shape: tuple[int, ...], window: Any, stride: Any = 1, dilation: Any = 1, causal: Any = False
) -> NDArray[np.bool_]:
    """Which tokens each token of the grid sees, `[L, L]`, the last axis fastest."""
    rules = list(zip(*(spread(x, len(shape)) for x in (window, stride, dilation, causal)), strict=True))
    mask = np.zeros((int(np.prod(shape)),) * 2, bool)
    for token in itertools.product(*map(range, shape)):
        seen = [window_tokens(x, n, *rule) for x, n, rule in zip(token, shape, rules, strict=True)]
        for key in itertools.product(*seen):
            mask[np.ravel_multi_index(token, shape), np.ravel_multi_index(key, shape)] = True
    return mask


def neighborhood_bias(table: ArrayLike, shape: tuple[int, ...], window: Any, dilation: Any = 1) -> NDArray[np.float64]:
    """The table `[H, 2 w1 - 1, ..]` as a bias `[H, L, L]`; arbitrary where a token is not seen."""
    sizes, gaps = spread(window, len(shape)), spread(dilation, len(shape))
    tokens = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, len(shape))
    places = tokens // np.array(gaps)
    entry = places[None] - places[:, None] + np.array(sizes) - 1
    entry = np.clip(entry, 0, 2 * np.array(sizes) - 2)
    return np.asarray(table, np.float64)[(slice(None), *np.moveaxis(entry, -1, 0))]


def generalized_neighborhood_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    window: Any,
    stride: Any = 1,
    dilation: Any = 1,
    causal: Any = False,
    extra_k: ArrayLike | None = None,
    extra_v: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.generalized_neighborhood_attention`."""
    q, k, v = (np.asarray(x) for x in (q, k, v))
    shape = q.shape[2:-1]
    q4, k4, v4 = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (q, k, v))
    mask = neighborhood_mask(shape, window, stride, dilation, causal)
    add = None if bias is None else neighborhood_bias(bias, shape, window, dilation)
    if extra_k is not None and extra_v is not None:
        xk, xv = np.asarray(extra_k), np.asarray(extra_v)
        rows, more = mask.shape[0], xk.shape[2]
        k4, v4 = np.concatenate([xk, k4], axis=2), np.concatenate([xv, v4], axis=2)
        mask = np.concatenate([np.ones((rows, more), bool), mask], axis=1)
        if add is not None:
            add = np.concatenate([np.zeros((len(add), rows, more)), add], axis=2)
    out, lse = attention(q4, k4, v4, mask=mask, bias=add, scale=scale, softcap=softcap, sinks=sinks, return_lse=True)
    out, lse = out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])
    return (out, lse) if return_lse else out
