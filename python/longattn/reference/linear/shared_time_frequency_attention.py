"""MambAttention from its formula, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.linear.mamba_mixer import bidirectional_mamba

Float64 = NDArray[np.float64]


def shared_time_frequency_attention(
    x: ArrayLike,
    norm: Any,
    wq: ArrayLike,
    wk: ArrayLike,
    wv: ArrayLike,
    wo: ArrayLike,
    *,
    heads: int = 8,
    time: Any = None,
    frequency: Any = None,
    frequency_first: bool = False,
) -> Float64:
    """Output `[B, T, F, C]`; see `longattn.linear.shared_time_frequency_attention`."""
    y = np.array(x, np.float64)
    wq, wk, wv, wo = (np.asarray(w, np.float64) for w in (wq, wk, wv, wo))
    weight, bias = (np.asarray(w, np.float64) for w in norm)
    for axis in ("frequency", "time") if frequency_first else ("time", "frequency"):
        other = y.shape[2] if axis == "time" else y.shape[1]
        for i in range(other):
            lines = y[:, :, i] if axis == "time" else y[:, i]
            centred = lines - lines.mean(axis=-1, keepdims=True)
            normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias
            lines += attend(normed, wq, wk, wv, wo, heads)
            mamba = time if axis == "time" else frequency
            if mamba is not None:
                lines += bidirectional_mamba(lines, mamba[0], mamba[1], merge="concat", w_merge=mamba[2])
    return y


def attend(x: Float64, wq: Float64, wk: Float64, wv: Float64, wo: Float64, heads: int) -> Float64:
    """Softmax attention of several heads over rows `[B, n, C]`."""
    q, k, v = (np.split(x @ w, heads, axis=-1) for w in (wq, wk, wv))
    rows = []
    for a, b, c in zip(q, k, v, strict=True):
        s = a @ b.swapaxes(1, 2) * a.shape[-1] ** -0.5
        e = np.exp(s - s.max(axis=-1, keepdims=True, initial=-np.inf))
        rows.append(e / e.sum(axis=-1, keepdims=True) @ c)
    joined: Float64 = np.concatenate(rows, axis=-1) @ wo
    return joined
