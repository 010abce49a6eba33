"""`partial_visual_attention` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, convolution, flat, linear, wide


def partial_visual_attention(
    x: ArrayLike,
    split: int,
    mode: str,
    weights: Any,
    *,
    kernel: Any = None,
    heads: int = 1,
    bias: Any = None,
    wo: Any = None,
) -> Float64:
    """See `longattn.vision.partial_visual_attention`."""
    a = wide(x)
    one, two = a[..., :split], a[..., split:]
    if kernel is not None and split:
        one = convolution(one, kernel)
    if two.shape[-1]:
        rows = flat(two)
        if mode == "attention":
            q, k, v = (linear(rows, w) for w in weights)
            two = attend(q, k, v, heads, None, 0.0 if bias is None else wide(bias)).reshape(two.shape)
        elif mode == "spatial":
            two = two * np.clip((linear(two, weights) + 3) / 6, 0, 1)
        elif mode == "channel":
            moments = np.concatenate([rows.mean(axis=1), rows.std(axis=1)], axis=-1)
            two = two / (1 + np.exp(-linear(moments, weights)))[:, None, None]
        else:
            mean = rows.mean(axis=1)
            z = (mean - mean.mean(axis=-1, keepdims=True)) / np.sqrt(mean.var(axis=-1, keepdims=True) + 1e-5)
            two = two * np.exp(-(z**2) / (2 * weights**2))[:, None, None]
    return linear(np.concatenate([one, two], axis=-1), wo)
