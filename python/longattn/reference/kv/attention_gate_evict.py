"""Attention-Gate from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention
from longattn.reference.kv.evicting import Float64


def attention_gate(
    x: ArrayLike,
    wq: ArrayLike,
    wk: ArrayLike,
    wv: ArrayLike,
    wo: ArrayLike,
    *,
    heads: int,
    tau: float = 0.5,
    causal: bool = False,
) -> tuple[NDArray[np.bool_], Float64]:
    """See `longattn.kv.evict.attention_gate`."""
    x, wq, wk, wv, wo = (np.asarray(a, np.float64) for a in (x, wq, wk, wv, wo))
    q, k, v = ((x @ w).reshape(*x.shape[:-1], heads, -1).swapaxes(-3, -2) for w in (wq, wk, wv))
    mixed = attention(q, k, v, causal=causal).swapaxes(-3, -2).reshape(*x.shape[:-1], -1)
    p = 1 / (1 + np.exp(-(mixed @ wo).swapaxes(-1, -2)))
    return p >= tau, p


def gated_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    flags: ArrayLike,
    *,
    keep_self: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.kv.evict.gated_attention`."""
    q, flags = np.asarray(q, np.float64), np.asarray(flags, bool)
    length = flags.shape[-1]
    mask = flags[..., None, :] | (np.eye(length, dtype=bool) & keep_self)
    group = q.shape[-3] // flags.shape[-2]
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks, "return_lse": return_lse}
    return attention(q, k, v, causal=True, mask=np.repeat(mask, group, axis=-3), **options)
