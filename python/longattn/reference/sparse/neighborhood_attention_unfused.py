"""Neighbourhood attention in halves: float64 numpy, one token at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.sparse.generalized_neighborhood_attention import neighborhood_bias, spread, window_tokens


def window_places(
    shape: tuple[int, ...], window: Any, dilation: Any, causal: Any
) -> Iterator[tuple[tuple[int, ...], int, tuple[int, ...]]]:
    """Every token, with each place of its window that counts and the token there."""
    axes = len(shape)
    sizes = spread(window, axes)
    rules = list(zip(shape, sizes, (1,) * axes, spread(dilation, axes), spread(causal, axes), strict=True))
    for token in itertools.product(*map(range, shape)):
        seen = [window_tokens(x, *rule) for x, rule in zip(token, rules, strict=True)]
        for offset in itertools.product(*(range(len(of_axis)) for of_axis in seen)):
            key = tuple(of_axis[n] for of_axis, n in zip(seen, offset, strict=True))
            yield token, int(np.ravel_multi_index(offset, sizes)), key


def na_qk(
    q: ArrayLike,
    k: ArrayLike,
    *,
    window: Any,
    dilation: Any = 1,
    causal: Any = False,
    bias: ArrayLike | None = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    """See `longattn.sparse.na_qk`."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    shape = q.shape[2:-1]
    scores = np.full((*q.shape[:-1], int(np.prod(spread(window, len(shape))))), -np.inf)
    add = None if bias is None else neighborhood_bias(bias, shape, window, dilation)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    every = (slice(None), slice(None))
    for token, place, key in window_places(shape, window, dilation, causal):
        logit = factor * (q[every + token] * k[every + key]).sum(axis=-1)
        if add is not None:
            logit = logit + add[:, np.ravel_multi_index(token, shape), np.ravel_multi_index(key, shape)]
        at: Any = (*every, *token, place)
        scores[at] = logit
    return scores


def na_av(
    weights: ArrayLike, v: ArrayLike, *, window: Any, dilation: Any = 1, causal: Any = False
) -> NDArray[np.float64]:
    """See `longattn.sparse.na_av`."""
    weights, v = np.asarray(weights, np.float64), np.asarray(v, np.float64)
    v = np.repeat(v, weights.shape[1] // v.shape[1], axis=1)
    out = np.zeros((*weights.shape[:-1], v.shape[-1]))
    every = (slice(None), slice(None))
    for token, place, key in window_places(weights.shape[2:-1], window, dilation, causal):
        at: Any = (*every, *token, place, None)
        out[every + token] += weights[at] * v[every + key]
    return out


def na_qk_backward(
    d_scores: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    *,
    window: Any,
    dilation: Any = 1,
    causal: Any = False,
    scale: float | None = None,
    return_d_bias: bool = False,
) -> tuple[NDArray[np.float64], ...]:
    """See `longattn.sparse.na_qk_backward`."""
    d_scores, q, k = (np.asarray(x, np.float64) for x in (d_scores, q, k))
    group, shape = q.shape[1] // k.shape[1], q.shape[2:-1]
    wide = np.repeat(k, group, axis=1)
    sizes, gaps = spread(window, len(shape)), spread(dilation, len(shape))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    dq, dk = np.zeros_like(q), np.zeros_like(wide)
    d_bias = np.zeros((q.shape[1], *(2 * size - 1 for size in sizes)))
    every = (slice(None), slice(None))
    for token, place, key in window_places(shape, window, dilation, causal):
        at: Any = (*every, *token, place)
        change = d_scores[at]
        dq[every + token] += factor * change[..., None] * wide[every + key]
        dk[every + key] += factor * change[..., None] * q[every + token]
        steps = zip(key, token, gaps, sizes, strict=True)
        entry: Any = (slice(None), *(j // gap - i // gap + size - 1 for j, i, gap, size in steps))
        d_bias[entry] += change.sum(axis=0)
    dk = dk.reshape(k.shape[0], k.shape[1], group, *k.shape[2:]).sum(axis=2)
    return (dq, dk, d_bias) if return_d_bias else (dq, dk)


def na_av_backward(
    d_out: ArrayLike, weights: ArrayLike, v: ArrayLike, *, window: Any, dilation: Any = 1, causal: Any = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """See `longattn.sparse.na_av_backward`."""
    d_out, weights, v = (np.asarray(x, np.float64) for x in (d_out, weights, v))
    group = weights.shape[1] // v.shape[1]
    wide = np.repeat(v, group, axis=1)
    d_weights, dv = np.zeros_like(weights), np.zeros_like(wide)
    every = (slice(None), slice(None))
    for token, place, key in window_places(weights.shape[2:-1], window, dilation, causal):
        at: Any = (*every, *token, place)
        d_weights[at] = (d_out[every + token] * wide[every + key]).sum(axis=-1)
        dv[every + key] += weights[at][..., None] * d_out[every + token]
    return d_weights, dv.reshape(v.shape[0], v.shape[1], group, *v.shape[2:]).sum(axis=2)


def neighborhood_attention_unfused(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    window: Any,
    dilation: Any = 1,
    causal: Any = False,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    return_weights: bool = False,
) -> Any:
    """See `longattn.sparse.neighborhood_attention_unfused`."""
    scores = na_qk(q, k, window=window, dilation=dilation, causal=causal, bias=bias, scale=scale)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = na_av(weights, v, window=window, dilation=dilation, causal=causal)
    return (out, weights) if return_weights else out
