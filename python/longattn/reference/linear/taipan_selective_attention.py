"""Selective attention, token by token."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, pairs, softmax


def taipan_selective_attention(
    h: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    scores: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    w_o: ArrayLike | None = None,
    window: int = 2048,
    kv_scope: str = "selected",
    scale: float | None = None,
) -> Float64:
    """See `longattn.linear`; without the state."""
    out: Float64 = np.asarray(h, np.float64).copy()
    qn, kn, vn = pairs(q, k, v)
    gate = np.asarray(scores, np.float64)
    selected = gate[..., 1] > gate[..., 0]
    shares = softmax(gate)[..., 1] if alpha is None else np.asarray(alpha, np.float64)
    s = qn.shape[-1] ** -0.5 if scale is None else scale
    for b, i in np.argwhere(selected):
        seen = np.arange(i + 1)
        if kv_scope == "selected":
            seen = seen[selected[b, : i + 1]]
        seen = seen[-window:]
        weights = softmax(s * np.einsum("hd,hjd->hj", qn[b, :, i], kn[b][:, seen]))
        o = np.einsum("hj,hjd->hd", weights, vn[b][:, seen]).reshape(-1)
        if w_o is not None:
            o = o @ np.asarray(w_o, np.float64)
        out[b, i] = (1 - shares[b, i]) * out[b, i] + shares[b, i] * o
    return out
