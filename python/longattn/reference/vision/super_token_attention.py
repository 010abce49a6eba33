"""`super_token_attention` from its formula, with the membership of every place in every cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, flat, linear, padded, places, wide


def super_token_attention(
    x: ArrayLike,
    wq: Any,
    wk: Any,
    wv: Any,
    *,
    heads: int,
    cell: int | Sequence[int] = 8,
    rounds: int = 1,
    border: str = "mask",
    wo: Any = None,
) -> Float64:
    """See `longattn.vision.super_token_attention`."""
    a = wide(x)
    size = np.array([cell, cell] if isinstance(cell, int) else cell)
    full = padded(a, size)
    extents = np.array(full.shape[1:3])
    rows = flat(full)
    own = places(extents) // size
    cells = places(extents // size)
    near = (np.abs(own[:, None] - cells[None]) <= 1).all(axis=-1)
    same = (own[:, None] == cells[None]).all(axis=-1)
    tokens = same.T @ rows / same.sum(axis=0)[:, None]

    def refined(t: Float64) -> Float64:
        return linear(attend(linear(t, wq), linear(t, wk), linear(t, wv), heads), wo)

    if (size == 1).all():
        return refined(flat(a)).reshape(*a.shape[:3], -1)
    # Cells outside the grid have the logit 0.
    missing = 9 - near.sum(axis=1) if border == "zero" else np.zeros(len(near))
    for _ in range(rounds):
        e = np.where(near, np.exp(rows @ tokens.swapaxes(1, 2) / np.sqrt(a.shape[-1])), 0.0)
        q = e / (e.sum(axis=-1) + missing)[..., None]
        tokens = q.swapaxes(1, 2) @ rows / (q.sum(axis=1)[..., None] + 1e-12)
    out: Float64 = (q @ refined(tokens)).reshape(*full.shape[:3], -1)[:, : a.shape[1], : a.shape[2]]
    return out
