"""`match_to_match_additive_attention` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, linear, softmax, wide


def match_to_match_additive_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    w_q: ArrayLike,
    w_k: ArrayLike,
    w_r: Any,
    *,
    cos: ArrayLike | None = None,
    sin: ArrayLike | None = None,
    scale: float | None = None,
    mask: ArrayLike | None = None,
    pair_reduce: bool = True,
) -> Float64:
    """See `longattn.vision.match_to_match_additive_attention`."""
    q, k, v = wide(q), wide(k), wide(v)
    s = q.shape[-1] ** -0.5 if scale is None else scale

    def turned(x: Float64) -> Float64:
        if cos is None or sin is None:
            return x
        z = (x[..., ::2] + 1j * x[..., 1::2]) * (wide(cos) + 1j * wide(sin))
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)

    def pairs(x: Float64) -> Float64:
        return x.reshape(*x.shape[:-1], -1, 2).sum(axis=-1) if pair_reduce else x

    def pooled(w: ArrayLike, keys: Float64, values: Float64) -> Float64:
        logits = s * np.einsum("hd,bhnd->bhn", wide(w), keys)
        a = softmax(np.where(True if mask is None else np.asarray(mask), logits, -np.inf))
        return np.asarray(np.einsum("bhn,bhnd->bhd", a, values)[:, :, None])

    g = pooled(w_q, q, turned(q))
    h = pooled(w_k, pairs(k * g), turned(k))
    return linear(pairs(v * h), w_r) + q
