"""Attention without positions and a factor per head, from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.dense.attention import Float64, attention, visible_keys


def head_scaled_nope_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    lam: ArrayLike,
    *,
    causal: bool = True,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Attention whose logits are `lam_h * scale * q k^T`; see `longattn.dense`.

    Returns:
        As `longattn.reference.dense.attention`.
    """
    q, lam = np.asarray(q, np.float64), np.asarray(lam, np.float64)
    factor = lam * (q.shape[-1] ** -0.5 if scale is None else scale)
    return attention(q * factor[..., None, None], k, v, causal=causal, scale=1.0, **options)


def mean_entropy(q: ArrayLike, k: ArrayLike, lam: ArrayLike, *, causal: bool = True) -> Float64:
    """`[Hq]`, each head's entropy of the weights, `-sum_j w_j ln w_j`, as a mean over batch and rows."""
    q, k, lam = (np.asarray(x, np.float64) for x in (q, k, lam))
    k = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
    s = lam[..., None, None] * q.shape[-1] ** -0.5 * (q @ k.swapaxes(-1, -2))
    rows, keys = s.shape[-2:]
    distance = (np.arange(rows) + keys - rows)[:, None] - np.arange(keys)
    s = np.where(visible_keys(distance, causal, (-1, -1)), s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
    mean: Float64 = np.moveaxis(entropy, -2, 0).reshape(q.shape[-3], -1).mean(axis=1)
    return mean
