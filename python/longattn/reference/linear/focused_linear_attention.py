"""Focused linear attention from all pairs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, convolved, pairs


def focused(
    x: ArrayLike, power: float, channel_scale: ArrayLike | None, norm_scope: str, pos: ArrayLike | None = None
) -> Float64:
    """The map of rows `[B, H, L, D]`."""
    y = np.asarray(x, np.float64)
    heads, length, dim = y.shape[-3:]
    if pos is not None:
        y = y + np.asarray(pos, np.float64).reshape(length, heads, dim).swapaxes(0, 1)
    scale = np.zeros(heads * dim) if channel_scale is None else np.asarray(channel_scale, np.float64)
    y = (np.maximum(y, 0) + 1e-6) / np.logaddexp(0, scale).reshape(heads, 1, dim)
    raised = y**power
    axes = (-3, -1) if norm_scope == "all" else (-1,)
    lengths = (np.sqrt((a * a).sum(axis=axes, keepdims=True)) for a in (y, raised))
    before, after = lengths
    found: Float64 = raised * (before / after)
    return found


def focused_linear_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    power: float = 3.0,
    channel_scale: ArrayLike | None = None,
    pos: ArrayLike | None = None,
    norm_scope: str = "all",
    eps: float = 1e-6,
    dwc_weight: ArrayLike | None = None,
    dwc_bias: ArrayLike | None = None,
    size: tuple[int, int] | None = None,
) -> Float64:
    """See `longattn.linear`."""
    mapped_q = focused(q, power, channel_scale, norm_scope)
    mapped_k = focused(k, power, channel_scale, norm_scope, pos)
    qn, kn, vn = pairs(mapped_q, mapped_k, v)
    weights = qn @ kn.swapaxes(-1, -2) / kn.shape[-2]
    out = weights / (weights.sum(axis=-1, keepdims=True) + eps) @ vn
    found: Float64 = out + (0 if dwc_weight is None else convolved(vn, dwc_weight, dwc_bias, size))
    return found
