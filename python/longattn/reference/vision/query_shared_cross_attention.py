"""`query_shared_cross_attention` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, linear, wide


def query_shared_cross_attention(
    x: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    wq: Any,
    first_weights: Any,
    second_weights: Any,
    *,
    heads: int,
    wo: Any = None,
    joint: bool = False,
    scale: float | None = None,
    first_mask: ArrayLike | None = None,
    second_mask: ArrayLike | None = None,
) -> Float64:
    """See `longattn.vision.query_shared_cross_attention`."""
    q = linear(x, wq)
    rows = [[linear(wide(s), w) for w in ws] for s, ws in ((first, first_weights), (second, second_weights))]
    n = q.shape[1]
    masks = [
        np.broadcast_to(True if m is None else np.asarray(m), (len(q), heads, n, r[0].shape[1]))
        for m, r in zip((first_mask, second_mask), rows, strict=True)
    ]
    if joint:
        k, v = (np.concatenate([rows[0][i], rows[1][i]], axis=1) for i in range(2))
        return linear(attend(q, k, v, heads, scale, mask=np.concatenate(masks, axis=-1)), wo)
    parts = [attend(q, k, v, heads, scale, mask=m) for (k, v), m in zip(rows, masks, strict=True)]
    return linear(parts[0] + parts[1], wo)
