"""InLine attention from all pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, convolved, features, kept, pairs


def inline_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    phi: Any = "identity",
    scale: float | None = None,
    local_weights: ArrayLike | None = None,
    size: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    mask: ArrayLike | None = None,
) -> Float64:
    """See `longattn.linear`."""
    s = np.asarray(q).shape[-1] ** -0.5 if scale is None else scale
    qn, kn, vn = pairs(features(q, phi), features(k, phi), v)
    plain = qn @ kn.swapaxes(-1, -2)
    here = kept(mask, plain)
    count = np.maximum(here.sum(axis=-1, keepdims=True), 1)
    mean = (plain * here).sum(axis=-1, keepdims=True) / count
    weights = (s * plain - s * mean + 1) / count * here
    local = 0 if local_weights is None else convolved(vn, local_weights, None, size, prefix_tokens)
    found: Float64 = weights @ vn + local
    return found
