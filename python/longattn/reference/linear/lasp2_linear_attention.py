"""Linear attention from its quadratic form: float64, all pairs of positions at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def lasp2_linear_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    workers: int = 4,
    causal: bool = True,
    log_decay: ArrayLike | None = None,
    phi: Callable[[Any], Any] | None = None,
    normalize: bool = False,
    state: ArrayLike | None = None,
    return_state: bool = False,
) -> Any:
    """`sum_j w_ij (q_i . k_j) v_j`; see `longattn.linear`. `workers` changes nothing here."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if q.ndim == 3:
        first = None if state is None else np.asarray(state)[None]
        out, last = lasp2_linear_attention(
            q[None], k[None], v[None], causal=causal, log_decay=log_decay, phi=phi, normalize=normalize, state=first,
            return_state=True,
        )  # fmt: skip
        return (out[0], last[0]) if return_state else out[0]
    if phi is not None:
        q, k = np.asarray(phi(q), np.float64), np.asarray(phi(k), np.float64)
    if normalize:
        v = np.concatenate([v, np.ones((*v.shape[:-1], 1))], axis=-1)
    weights, total, prefix = decays(k.shape[:-1], log_decay, causal)
    group = q.shape[1] // k.shape[1]
    last = np.einsum("bhj,bhjd,bhje->bhde", total, k, v)
    k, v, weights, prefix = (np.repeat(x, group, axis=1) for x in (k, v, weights, prefix))
    out = ((q @ k.swapaxes(-1, -2)) * weights) @ v
    if state is not None:
        first = np.asarray(state, np.float64)
        out = out + prefix[..., None] * (q @ np.repeat(first, group, axis=1))
        last = last + prefix[:, ::group, -1, None, None] * first
    if normalize:
        mass = out[..., -1:]
        out = np.where(mass == 0, 0.0, out[..., :-1] / np.where(mass == 0, 1.0, mass))
    return (out, last) if return_state else out


def decays(rows: tuple[int, ...], log_decay: ArrayLike | None, causal: bool) -> tuple[Float64, Float64, Float64]:
    """Weights `[B, Hkv, L, L]` of query and key, of a key in the last state, and of the first state for a query."""
    _, heads, length = rows
    per_token = np.zeros(rows)
    if log_decay is not None:
        g = np.asarray(log_decay, np.float64)
        per_token = per_token + (g[:, None] if g.shape == (heads,) else g)
    weights = np.zeros((*rows, length))
    for i in range(length):
        for j in range(length):
            if j <= i:
                weights[..., i, j] = np.exp(per_token[..., j + 1 : i + 1].sum(axis=-1))
            elif not causal:
                weights[..., i, j] = 1.0
    total = np.stack([np.exp(per_token[..., j + 1 :].sum(axis=-1)) for j in range(length)], axis=-1)
    return weights, total, np.exp(np.cumsum(per_token, axis=-1))


def lasp2_linear_attention_backward(
    d_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    workers: int = 4,
    causal: bool = True,
    log_decay: ArrayLike | None = None,
) -> tuple[Float64, Float64, Float64]:
    """Gradients `(dq, dk, dv)`; see `longattn.linear`."""
    d_out, q, k, v = (np.asarray(x, np.float64) for x in (d_out, q, k, v))
    weights, *_ = decays(k.shape[:-1], log_decay, causal)
    group, heads = q.shape[1] // k.shape[1], k.shape[1]
    k_all, v_all, weights = (np.repeat(x, group, axis=1) for x in (k, v, weights))
    ds = weights * (d_out @ v_all.swapaxes(-1, -2))
    p = weights * (q @ k_all.swapaxes(-1, -2))

    def over_group(x: Float64) -> Float64:
        summed: Float64 = x.reshape(x.shape[0], heads, group, *x.shape[2:]).sum(axis=2)
        return summed

    return ds @ k_all, over_group(ds.swapaxes(-1, -2) @ q), over_group(p.swapaxes(-1, -2) @ d_out)
