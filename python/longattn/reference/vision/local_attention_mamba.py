"""`local_attention_mamba` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.mamba_mixer import mixed
from longattn.reference.vision.layers import Float64, attend, flat, inner_places, linear, places, wide

_ORDERS = {"forward": ["forward"], "both": ["forward", "back"], "cross": ["forward", "back", "down", "up"]}


def local_attention_mamba(
    x: ArrayLike,
    attention: Any,
    scan: Any,
    *,
    window: Any,
    heads: int,
    directions: str = "cross",
    bias: Any = None,
    scale: float | None = None,
) -> Float64:
    """See `longattn.vision.local_attention_mamba`."""
    a = wide(x)
    extents, size = a.shape[1:3], np.broadcast_to(np.asarray(window), 2)
    groups = places(extents) // size
    same = (groups[:, None] == groups[None]).all(axis=-1)
    added: Any = 0.0
    if bias is not None:
        number = inner_places(extents, tuple(int(n) for n in size))
        added = np.broadcast_to(wide(bias), (heads, *(int(size.prod()),) * 2))[:, number[:, None], number[None]]
    rows = flat(a)
    q, k, v = (linear(rows, w) for w in attention[:3])
    local = linear(attend(q, k, v, heads, scale, added, same), attention[3])
    out = mixed(local, scan, _ORDERS[directions], extents)
    return out.reshape(*a.shape[:3], -1)
