"""Recurrences of matrix states, row after row in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.linear.features import features

Float64 = NDArray[np.float64]


def recurrence(
    q: ArrayLike,
    k: ArrayLike | None,
    v: ArrayLike,
    *,
    g: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    delta: bool = False,
    scale: float | None = None,
    unit: float | None = None,
    normaliser: float | None = None,
    skip: ArrayLike | None = None,
    columns: bool | None = None,
    bonus: ArrayLike | None = None,
    pair: tuple[ArrayLike, ArrayLike] | None = None,
    maps: tuple[Any, Any] = (None, None),
    initial_state: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
) -> tuple[Float64, Float64]:
    """`S_t = Diag(e^g_t) S_(t-1) + beta_t k_t u_t^T`, `o_t = scale q_t^T S_t`, `u_t` being `v_t`, or less what is held.

    `g` is `[H]`, `[B, H, L]` or `[B, H, L, D]`, with `columns` `[B, H, L, Dv]`, which decays columns of the state; True
    multiplies values by `1 - e^g`. With a `bonus` `u`, `o_t = scale q_t^T (S_(t-1) + Diag(u) k_t v_t^T)`. A `pair`
    adds `b_t (a_t^T S_(t-1))`. `maps` make features of queries and keys. Arguments without a batch have none in the
    result either.
    """
    queries, v = np.asarray(q, np.float64), np.asarray(v, np.float64)
    one = queries.ndim == 3
    if one:
        queries, v = queries[None], v[None]
    batch, heads, length, value_dim = v.shape
    if maps[0] is not None:
        queries = features(queries, maps[0])
    dim = queries.shape[-1]
    axis = dim if columns is None else value_dim
    log = np.zeros((batch, heads, length, axis))
    if g is not None:
        x = np.asarray(g, np.float64)
        if x.ndim == 1:
            x = x[:, None, None]
        elif x.shape[-1] != axis or x.ndim + one != 4:
            x = x[..., None]
        log = log + x
    with np.errstate(under="ignore"):
        decay = np.exp(log)
    keys: Float64 = -np.expm1(log) if k is None else np.asarray(k, np.float64)
    keys = keys[None] if keys.ndim == 3 else keys
    if maps[1] is not None:
        keys = features(keys, maps[1])
    if columns is not None:
        v = v * -np.expm1(log) if columns else v
    rule = None
    if pair is not None:
        rule = [np.asarray(x, np.float64) for x in pair]
        rule = [np.repeat(x[None] if one else x, heads // keys.shape[1], axis=1) for x in rule]
    if unit is not None:
        queries, keys = (x / np.sqrt((x**2).sum(-1, keepdims=True) + unit) for x in (queries, keys))
    queries = queries * (dim**-0.5 if scale is None else scale)
    keys = np.repeat(keys, heads // keys.shape[1], axis=1)
    readers = max(queries.shape[1], heads)
    queries = np.repeat(queries, readers // queries.shape[1], axis=1)
    factor = np.broadcast_to(np.asarray(1.0 if beta is None else beta, np.float64), (batch, heads, length))
    values = v if normaliser is None else np.concatenate([v, np.ones((*v.shape[:-1], 1))], axis=-1)
    bounds = None if cu_seqlens is None else np.asarray(cu_seqlens)
    sequences = [(b, 0, length) for b in range(batch)]
    if bounds is not None:
        sequences = [(0, int(a), int(z)) for a, z in pairwise(bounds)]
    states = np.zeros((len(sequences), heads, dim, values.shape[-1]))
    if initial_state is not None:
        states += np.asarray(initial_state, np.float64)
    out = np.zeros((batch, readers, length, values.shape[-1]))
    for n, (b, start, end) in enumerate(sequences):
        for t in range(start, end):
            before = states[n].copy()
            state = before * (decay[b, :, t, :, None] if columns is None else decay[b, :, t, None, :])
            if rule is not None:
                state = state + np.einsum("hd,hf,hfe->hde", rule[1][b, :, t], rule[0][b, :, t], before)
            update = values[b, :, t]
            if delta:
                update = update - np.einsum("hd,hde->he", keys[b, :, t], state)
            state = state + (factor[b, :, t, None] * keys[b, :, t])[..., None] * update[:, None]
            states[n] = state
            if bonus is not None:
                state = before + (np.asarray(bonus, np.float64) * keys[b, :, t])[..., None] * update[:, None]
            out[b, :, t] = np.einsum("hd,hde->he", queries[b, :, t], np.repeat(state, readers // heads, axis=0))
    if normaliser is not None:
        mass = out[..., -1:] + normaliser
        out = np.divide(out[..., :-1], mass, out=np.zeros((*out.shape[:-1], value_dim)), where=mass != 0)
    if skip is not None:
        out = out + np.asarray(skip, np.float64)[:, None, None] * v
    found: tuple[Any, Any] = (out[0] if one else out, states[0] if one and bounds is None else states)
    return found
