"""Gradients of exact attention from their formulas: float64 numpy with materialised weights.

Arguments are those of `longattn.dense.attention_backward`, as numpy arrays; results are float64. Nothing is checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention, row_factors

Float64 = NDArray[np.float64]


def attention_backward(
    d_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    d_lse: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    softcap: float = 0.0,
    sinks: ArrayLike | None = None,
    return_d_sinks: bool = False,
    **options: Any,
) -> Any:
    """Gradients of softmax attention; see `longattn.dense.attention_backward`.

    Returns:
        `(dq, dk, dv)`, with `return_d_sinks` also `d_sinks`.
    """
    q, k, v, out, lse, d_out = (np.asarray(x, np.float64) for x in (q, k, v, out, lse, d_out))
    kv_heads, keys = k.shape[-3:-1]
    group = q.shape[-3] // kv_heads
    # Attention over unit vectors is the weights.
    units = np.broadcast_to(np.eye(keys), (*k.shape[:-1], keys))
    p = attention(q, k, units, scale=scale, softcap=softcap, sinks=sinks, **options)

    k, v = (np.repeat(x, group, axis=-3) for x in (k, v))
    factor = row_factors(q.shape[-1] ** -0.5 if scale is None else scale)
    slope: Float64 | float = 1.0
    if softcap:
        slope = 1 - np.tanh(factor * (q @ k.swapaxes(-1, -2)) / softcap) ** 2
    # d out / d logit = p (v - out), d lse / d logit = p.
    delta = (d_out * out).sum(axis=-1) - (0.0 if d_lse is None else np.asarray(d_lse, np.float64))
    ds = factor * slope * p * (d_out @ v.swapaxes(-1, -2) - delta[..., None])

    def over_group(x: Float64) -> Float64:
        summed: Float64 = x.reshape(*x.shape[:-3], kv_heads, group, *x.shape[-2:]).sum(axis=-3)
        return summed

    dq, dk, dv = ds @ k, over_group(ds.swapaxes(-1, -2) @ q), over_group(p.swapaxes(-1, -2) @ d_out)
    if not return_d_sinks:
        return dq, dk, dv
    # A row without a key and with a sink of minus infinity is a constant.
    top = np.where(lse == -np.inf, 0.0, lse)
    share = np.where(lse == -np.inf, 0.0, np.exp(np.asarray(sinks, np.float64)[:, None] - top))
    d_sinks = (-share * delta).sum(axis=-1)
    return dq, dk, dv, d_sinks.sum(axis=0) if d_sinks.ndim == 2 else d_sinks
