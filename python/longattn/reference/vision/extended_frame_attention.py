"""`extended_frame_attention` from its formula, with the mask of all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, wide


def extended_frame_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    frames: Sequence[Sequence[int]] | None = None,
    *,
    heads: int = 1,
    scale: float | None = None,
    kept: ArrayLike | None = None,
) -> Float64:
    """See `longattn.vision.extended_frame_attention`."""
    a = wide(q)
    b, f, n, _ = a.shape
    seen = np.zeros((f, f), bool)
    for i in range(f):
        seen[i, list(range(f) if frames is None else frames[i])] = True
    mask: Any = np.kron(seen, np.ones((n, n), bool))
    if kept is not None:
        mask = mask & np.asarray(kept).reshape(b, 1, 1, -1)
    rows = [wide(x).reshape(b, f * n, -1) for x in (q, k, v)]
    return attend(rows[0], rows[1], rows[2], heads, scale, mask=mask).reshape(a.shape)
