"""`swapped_window_cross_attention` from its formula, with the mask of all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, flat, group_mask, linear, wide


def swapped_window_cross_attention(
    spatial: ArrayLike, temporal: ArrayLike, weights: Any, *, heads: int, windows: int | Sequence[int], step: int = 0
) -> Float64:
    """See `longattn.vision.swapped_window_cross_attention`."""
    a, b = wide(spatial), wide(temporal)
    if step % 2:
        a, b = b, a
    size = (windows,) * 3 if isinstance(windows, int) else tuple(windows)
    q, k, v = (flat(linear(x, w)) for x, w in zip((a, b, b), weights[:3], strict=True))
    out = attend(q, k, v, heads, mask=group_mask(a.shape[1:4], size))
    return a + linear(out, weights[3]).reshape(a.shape)
