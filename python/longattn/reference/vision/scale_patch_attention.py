"""`scale_patch_attention` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, layer_norm, linear, wide


def scale_patch_attention(
    x: ArrayLike,
    scale_weights: Any,
    patch_weights: Any,
    *,
    heads: int,
    scale_norm: Any = None,
    patch_norm: Any = None,
    class_tokens: int = 0,
) -> Float64:
    """See `longattn.vision.scale_patch_attention`."""

    def step(rows: Float64, weights: Any, norm: Any) -> Float64:
        normed = rows if norm is None else layer_norm(rows, *norm)
        q, k, v = (linear(normed, w) for w in weights[:3])
        return rows + linear(attend(q, k, v, heads), weights[3])

    out = np.array(wide(x))
    out[:, class_tokens:] = step(out[:, class_tokens:], scale_weights, scale_norm)
    out[:, :, 0] = step(out[:, :, 0], patch_weights, patch_norm)
    return out
