"""`criss_cross_attention` from its formula, with the mask of all pairs."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, flat, linear, places, wide


def criss_cross_attention(
    x: ArrayLike, wq: Any, wk: Any, wv: Any, *, gamma: float = 1.0, scale: float = 1.0, rounds: int = 2
) -> Float64:
    """See `longattn.vision.criss_cross_attention`."""
    now = wide(x)
    at = places(now.shape[1:-1])
    mask = (at[:, None] != at[None]).sum(axis=-1) <= 1
    for _ in range(rounds):
        q, k, v = (flat(linear(now, w)) for w in (wq, wk, wv))
        now = gamma * attend(q, k, v, 1, scale, mask=mask).reshape(now.shape) + now
    return now
