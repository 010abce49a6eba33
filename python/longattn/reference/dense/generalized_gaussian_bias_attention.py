"""Attention with a generalised Gaussian prior over relative position, from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.dense.attention import attention, visible_keys


def generalized_gaussian_bias_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    inverse_scale: ArrayLike | None = None,
    shape: ArrayLike = 1.0,
    loc: ArrayLike = 0.0,
    eps: float = 1e-5,
    ssmax: ArrayLike | None = None,
    visible: ArrayLike | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Attention with the prior added as a matrix; see `longattn.dense`.

    Returns:
        As `longattn.reference.dense.attention`.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    *_, heads, rows, dim = q.shape
    keys = k.shape[-2]
    if inverse_scale is None:
        inverse_scale = [2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]
    factor, exponent, centre = (
        np.broadcast_to(np.asarray(x, np.float64), heads)[:, None, None] for x in (inverse_scale, shape, loc)
    )
    distance = (np.arange(rows) + keys - rows)[:, None] - np.arange(keys)
    with np.errstate(divide="ignore", over="ignore"):
        prior = np.maximum(-((np.abs((-distance - centre) * factor) + eps) ** exponent), -1e9)
    q = q * (dim**-0.5 if scale is None else scale)
    if ssmax is not None:
        seen = visible_keys(distance, causal, window).sum(axis=-1) if visible is None else np.asarray(visible)
        per_row = np.log(np.maximum(seen, 1))[..., None, :]  # [..., 1, Lq]
        q = q * (np.broadcast_to(np.asarray(ssmax, np.float64), heads)[:, None] * per_row)[..., None]
    return attention(q, k, v, causal=causal, window=window, scale=1.0, bias=prior, **options)
