"""The router of Flux attention, and attention by its gates, sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention


def flux_route(
    q: ArrayLike, weights: Sequence[tuple[ArrayLike, ArrayLike]], *, pool: int = 100, return_logits: bool = False
) -> Any:
    """See `longattn.diagnostics.flux_route`, with a batch axis."""
    logits = []
    for one in np.asarray(q, np.float64):
        rows = one if one.shape[1] <= 2 * pool else one[:, [*range(pool), *range(one.shape[1] - pool, one.shape[1])]]
        x = rows.reshape(-1, one.shape[-1]).mean(axis=0)
        for i, (w, b) in enumerate(weights):
            x = np.asarray(w, np.float64) @ x + np.asarray(b, np.float64)
            x = x / (1 + np.exp(-x)) if i in (0, 2, 3) else x
        logits.append(x)
    gates = np.argmax(logits, axis=1)
    return (gates, np.array(logits)) if return_logits else gates


def routed_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    gate: ArrayLike,
    *,
    sparse: str = "streaming",
    sinks: int = 128,
    window: int = 4096,
) -> NDArray[np.float64]:
    """See `longattn.diagnostics.routed_attention`, with a batch axis."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    rows, keys = q.shape[2], k.shape[2]
    i, j = np.arange(rows)[:, None] + keys - rows, np.arange(keys)
    seen = (i - j < window) | ((j < sinks) & (sparse == "streaming"))
    gates = np.broadcast_to(np.asarray(gate), (len(q),))
    parts = [
        attention(*one, causal=True, mask=np.ones_like(seen) if full else seen)
        for *one, full in zip(q, k, v, gates, strict=True)
    ]
    return np.array(parts)
