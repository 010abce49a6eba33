"""Kernelised attention with a relative bias from its formula, every pair, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.linear.features import features as rows_of_map

Float64 = NDArray[np.float64]


def kernelized_rpe_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    rpe: ArrayLike,
    features: Any,
    *,
    causal: bool = False,
    size: tuple[int, int] | None = None,
    qk_norm: bool = True,
    scale: float = 1.0,
) -> Float64:
    """Output `[B, Hq, Lq, Dv]`; see `longattn.linear.kernelized_rpe_attention`."""
    q, k, v, rpe = (np.asarray(x, np.float64) for x in (q, k, v, rpe))
    (batch, heads, rows, _), keys = q.shape, k.shape[2]
    if qk_norm:
        q, k = (x / np.where((n := np.linalg.norm(x, axis=-1, keepdims=True)) > 0, n, 1) for x in (q, k))
    phi_q, phi_k = (np.asarray(phi(x, features), np.float64) for x in (scale * q, k))
    out = np.zeros((batch, heads, rows, v.shape[3]))
    for h in range(heads):
        kv = h // (heads // k.shape[1])
        for i in range(rows):
            bias = np.full(keys, -np.inf)
            at = keys - rows + i if causal else i
            for j in range(at + 1 if causal else keys):
                if size is None:
                    bias[j] = rpe[h, j - at + rpe.shape[1] // 2]
                else:
                    (y, x), (yj, xj) = divmod(i, size[1]), divmod(j, size[1])
                    bias[j] = rpe[h, yj - y + size[0] - 1, xj - x + size[1] - 1]
            weights = np.exp(bias) * (phi_k[:, kv] @ phi_q[:, h, i, :, None])[..., 0]
            total = weights.sum(axis=-1, keepdims=True)
            out[:, h, i] = np.einsum("bj,bjd->bd", weights / np.where(total > 0, total, 1), v[:, kv])
    return out


def phi(x: Float64, features: Any) -> Any:
    """Features of rows."""
    if hasattr(features, "kind"):
        return rows_of_map(x, features)
    if callable(features):
        return features(x)
    w = np.asarray(features, np.float64)
    return len(w) ** -0.5 * np.exp(x @ w.T - 0.5 * (x**2).sum(axis=-1, keepdims=True))
