"""Attention by token types from its rule: a mask, pair by pair."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention


def nats_mask(types: ArrayLike, window: int = 256, window_for_all: bool = False) -> NDArray[np.bool_]:
    """Which query `i` sees which key `j`, `[..., L, L]`, from types `[..., L]`."""
    x = np.asarray(types)
    length = x.shape[-1]
    seen = np.zeros((*x.shape, length), bool)
    for at in np.ndindex(*x.shape[:-1]):
        globals_at = np.flatnonzero(x[at] == 0)
        for j in range(length):
            later = globals_at[globals_at >= j]
            upto = later[0] if len(later) else length
            for i in range(j, length):
                by_type = (True, i <= upto, i - j < window)[x[at][j]]
                seen[(*at, i, j)] = by_type or i == j or (window_for_all and i - j < window)
    return seen


def nats_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    types: ArrayLike,
    *,
    window: int = 256,
    window_for_all: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.kv.evict.nats_attention`."""
    q = np.asarray(q, np.float64)
    mask = nats_mask(types, window, window_for_all)
    group = q.shape[-3] // mask.shape[-3]
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks, "return_lse": return_lse}
    return attention(q, k, v, causal=True, mask=np.repeat(mask, group, axis=-3), **options)
