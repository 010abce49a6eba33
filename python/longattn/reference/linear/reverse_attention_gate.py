"""The reverse attention gate from its formula, float64."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.linear.selective_scan import sigmoid

Float64 = NDArray[np.float64]


def reverse_attention_gate(
    f: ArrayLike, logits: ArrayLike, *, weight: ArrayLike | None = None, residual: ArrayLike | None = None
) -> tuple[Float64, Float64]:
    """Gated features and resized logits; see `longattn.linear.reverse_attention_gate`."""
    f, logits = np.asarray(f, np.float64), np.asarray(logits, np.float64)
    if logits.ndim == f.ndim:
        logits = logits[..., 0]
    size, coarse = f.shape[1:-1], logits.shape[1:]
    m = np.zeros(f.shape[:-1])
    for place in np.ndindex(*size):
        sides = []
        for i, new, n in zip(place, size, coarse, strict=True):
            at = max((i + 0.5) * n / new - 0.5, 0.0)
            low = int(at)
            sides.append(((low, 1 - (at - low)), (min(low + 1, n - 1), at - low)))
        for corner in product(*sides):
            share = np.prod([w for _, w in corner])
            if share:
                m[:, *place] += share * logits[:, *(j for j, _ in corner)]
    gated = f * (1 - sigmoid(m))[..., None]
    result: Float64 = gated if weight is None else gated @ np.asarray(weight, np.float64)
    return (result if residual is None else result + np.asarray(residual, np.float64)), m[..., None]
