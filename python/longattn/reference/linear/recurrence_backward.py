"""Gradients of recurrences of matrix states: the adjoint recurrence, row after row in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def recurrence_backward(
    d_out: ArrayLike,
    d_state: ArrayLike | None,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    g: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    delta: bool = False,
    scale: float | None = None,
    normalize_qk: bool = False,
    normalize: bool = False,
    eps: float = 1e-6,
    pair: tuple[ArrayLike, ArrayLike] | None = None,
    initial_state: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
) -> dict[str, Float64]:
    """Gradients by name (`q`, `k`, `v`, `g`, `beta`, `a`, `b`, `initial_state`) of arguments with a batch.

    Forward, `S' = Diag(a_t) S_(t-1)`, `r_t = v_t - S'^T k_t` (or `v_t`), `S_t = S' + beta_t k_t r_t^T`, `o_t = scale
    S_t^T q_t`. Back, with `D` the gradient of `S_t`:

        D += scale q_t do_t^T              dq_t = scale S_t do_t
        dr_t = beta_t D^T k_t              dk_t = beta_t D r_t (- S' dr_t)       dbeta_t = k_t^T D r_t
        dv_t = dr_t                        D' = D (- k_t dr_t^T)
        dg_t = rows' sums of S' * D'       D of S_(t-1) = Diag(a_t) D'

    With a pair `a`, `b`, `S_t` has the summand `b_t y_t^T`, `y_t = S_(t-1)^T a_t`: `db_t = D y_t`, `dy_t = D^T b_t`,
    `da_t = S_(t-1) dy_t`, and `D` of `S_(t-1)` has the summand `a_t dy_t^T`.
    """
    queries, keys, values, d = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    batch, heads, length, value_dim = values.shape
    dim = queries.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    shape = (batch, heads, length, dim)
    log = np.zeros(shape)
    if g is not None:
        gates = np.asarray(g, np.float64)
        log = log + (gates if gates.ndim == 4 else gates[..., None])
    decay = np.exp(log)
    factor = np.ones(shape[:3]) if beta is None else np.asarray(beta, np.float64)
    lengths = [np.ones((*x.shape[:-1], 1)) for x in (queries, keys)]
    if normalize_qk:
        lengths = [np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (queries, keys)]
    queries, keys = (x / n for x, n in zip((queries, keys), lengths, strict=True))
    readers = max(queries.shape[1], heads)
    every_q = np.repeat(queries, readers // queries.shape[1], axis=1)
    every_k = np.repeat(keys, heads // keys.shape[1], axis=1)
    written = np.concatenate([values, np.ones((*values.shape[:-1], 1))], axis=-1) if normalize else values
    group = readers // heads
    sequences = [(b, 0, length) for b in range(batch)]
    if cu_seqlens is not None:
        sequences = [(0, int(a), int(z)) for a, z in pairwise(np.asarray(cu_seqlens))]
    first = np.zeros((len(sequences), heads, dim, written.shape[-1]))
    if initial_state is not None:
        first = first + np.asarray(initial_state, np.float64)
    dq, dk, dv = np.zeros(every_q.shape), np.zeros(every_k.shape), np.zeros(written.shape)
    reads, writes = np.zeros((2, *every_k.shape))
    if pair is not None:
        reads, writes = (np.repeat(np.asarray(x, np.float64), heads // keys.shape[1], axis=1) for x in pair)
    d_reads, d_writes = np.zeros(every_k.shape), np.zeros(every_k.shape)
    dg, d_beta, d_first = np.zeros(shape), np.zeros(shape[:3]), np.zeros(first.shape)
    for n, (b, start, end) in enumerate(sequences):
        states = [first[n]]
        for t in range(start, end):
            state = states[-1] * decay[b, :, t, :, None]
            r = written[b, :, t] - (np.einsum("hd,hde->he", every_k[b, :, t], state) if delta else 0)
            y = np.einsum("hd,hde->he", reads[b, :, t], states[-1])
            state = state + np.einsum("hd,he->hde", writes[b, :, t], y)
            states.append(state + np.einsum("h,hd,he->hde", factor[b, :, t], every_k[b, :, t], r))
        back = np.zeros(first.shape[1:]) if d_state is None else np.asarray(d_state, np.float64)[n].copy()
        for t in reversed(range(start, end)):
            after, before = states[t - start + 1], states[t - start] * decay[b, :, t, :, None]
            key, beta_t = every_k[b, :, t], factor[b, :, t]
            r = written[b, :, t] - (np.einsum("hd,hde->he", key, before) if delta else 0)
            d_row = scale * d[b, :, t]
            query = every_q[b, :, t]
            read = np.repeat(after, group, axis=0)
            if normalize:
                sums = scale * np.einsum("hd,hde->he", query, read)
                mass = sums[:, -1:] + eps
                d_row = d_row / mass
                d_row = np.concatenate([d_row, -(d_row * sums[:, :-1] / mass).sum(-1, keepdims=True)], axis=-1)
            dq[b, :, t] = np.einsum("hde,he->hd", read, d_row)
            back += np.einsum("hd,he->hde", query, d_row).reshape(heads, group, dim, -1).sum(1)
            y = np.einsum("hd,hde->he", reads[b, :, t], states[t - start])
            d_y = np.einsum("hd,hde->he", writes[b, :, t], back)
            d_writes[b, :, t] = np.einsum("hde,he->hd", back, y)
            d_reads[b, :, t] = np.einsum("hde,he->hd", states[t - start], d_y)
            d_beta[b, :, t] = np.einsum("hd,hde,he->h", key, back, r)
            d_r = beta_t[:, None] * np.einsum("hd,hde->he", key, back)
            dk[b, :, t] = beta_t[:, None] * np.einsum("hde,he->hd", back, r)
            dv[b, :, t] = d_r
            if delta:
                dk[b, :, t] -= np.einsum("hde,he->hd", before, d_r)
                back -= np.einsum("hd,he->hde", key, d_r)
            dg[b, :, t] = (before * back).sum(-1)
            back *= decay[b, :, t, :, None]
            back += np.einsum("hd,he->hde", reads[b, :, t], d_y)
        d_first[n] = back
    found: dict[str, Any] = {"v": dv[..., :value_dim], "initial_state": d_first, "beta": d_beta}
    for name, unit, gradient, size in (("q", queries, dq, lengths[0]), ("k", keys, dk, lengths[1])):
        own = gradient.reshape(batch, unit.shape[1], -1, length, dim).sum(2)
        along = (unit * own).sum(-1, keepdims=True) if normalize_qk else 0
        found[name] = (own - unit * along) / size
    for name, d_rows in (("a", d_reads), ("b", d_writes)):
        found[name] = d_rows.reshape(batch, keys.shape[1], -1, length, dim).sum(2)
    found["g"] = dg if g is None or np.ndim(g) == 4 else dg.sum(-1)
    return found
