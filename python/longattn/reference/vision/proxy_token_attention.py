"""`proxy_token_attention` from its formula, with masks of all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, flat, group_mask, inner_places, linear, places, wide


def proxy_token_attention(
    x: ArrayLike,
    proxies: Any,
    spread: Any,
    *,
    heads: int,
    windows: Sequence[int],
    index: ArrayLike,
    window: Any = None,
    shifted: Any = None,
    shift: bool = True,
) -> Float64:
    """See `longattn.vision.proxy_token_attention`."""
    a = wide(x)
    extents, size = np.array(a.shape[1:4]), np.array(windows)
    rows = flat(a)
    number = np.ravel_multi_index(tuple((places(extents) // size).T), tuple(extents // size))
    inner = inner_places(extents, size)
    drawn = np.broadcast_to(np.asarray(index), (len(a), np.shape(index)[-1]))
    chosen = np.stack(
        [[int(np.flatnonzero((number == w) & (inner == i))[0]) for w, i in enumerate(one)] for one in drawn]
    )

    def step(q: Float64, k: Float64, weights: Any, mask: Any = True) -> Float64:
        wq, wk, wv, wo = (None,) * 4 if weights is None else weights
        return linear(attend(linear(q, wq), linear(k, wk), linear(k, wv), heads, mask=mask), wo)

    tokens = np.take_along_axis(rows, chosen[..., None], axis=1)
    rows = rows + step(rows, step(tokens, tokens, proxies), spread)
    if window is not None:
        rows = rows + step(rows, rows, window, group_mask(extents, size))
    if shifted is not None:
        rolls = np.where(size < extents, size // 2 if shift else 0, 0)
        ids = np.concatenate([(places(extents) - rolls) % extents // size, places(extents) < rolls], axis=1)
        rows = rows + step(rows, rows, shifted, (ids[:, None] == ids[None]).all(axis=-1))
    return rows.reshape(a.shape)
