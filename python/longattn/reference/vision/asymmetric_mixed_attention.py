"""`asymmetric_mixed_attention` from its formula, with the block mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import attend, depthwise, flat, linear, wide


def asymmetric_mixed_attention(
    search: ArrayLike | None,
    templates: Sequence[ArrayLike],
    kernels: Any,
    wq: Any,
    wk: Any,
    wv: Any,
    *,
    heads: int,
    stride: int = 2,
    wo: Any = None,
    symmetric: bool = False,
    scale: float | None = None,
    cache: Any = None,
) -> Any:
    """See `longattn.vision.asymmetric_mixed_attention`."""
    parts = [wide(x) for x in (*templates, *([] if search is None else [search]))]
    q, k, v = (
        [linear(flat(depthwise(x, kernel, step)), w) for x in parts]
        for kernel, step, w in zip(kernels, (1, stride, stride), (wq, wk, wv), strict=True)
    )
    n = len(templates)
    known = [np.concatenate(a[:n], axis=1) for a in (k, v)] if cache is None else [wide(a) for a in cache]
    keys, values = (np.concatenate([a, *b[n:]], axis=1) for a, b in zip(known, (k, v), strict=True))
    is_search = np.concatenate([np.full(a.shape[1], i >= n) for i, a in enumerate(q)])
    from_search = np.arange(keys.shape[1]) >= known[0].shape[1]
    mask = np.logical_or(is_search[:, None] | symmetric, ~from_search[None])
    out = linear(attend(np.concatenate(q, axis=1), keys, values, heads, scale, mask=mask), wo)
    bounds = np.cumsum([a.shape[1] for a in q])[:-1]
    grids = [a.reshape(*x.shape[:3], -1) for a, x in zip(np.split(out, bounds, axis=1), parts, strict=True)]
    return grids[:n], None if search is None else grids[n], tuple(known)
