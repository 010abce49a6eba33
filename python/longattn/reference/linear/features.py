"""Feature maps, and attention by the weights that a method gives all pairs: float64, nothing factored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def softmax(x: Float64, axis: int = -1) -> Float64:
    """Softmax along an axis; zeros where everything is `-inf`."""
    most = x.max(axis=axis, keepdims=True, initial=-np.inf)
    e = np.exp(x - np.where(np.isfinite(most), most, 0))
    total = e.sum(axis=axis, keepdims=True)
    found: Float64 = np.divide(e, total, out=np.zeros_like(e), where=total > 0)
    return found


def features(x: ArrayLike, phi: Any) -> Float64:
    """Features of rows `[..., H, L, D]` by a `FeatureMap` or a map's name; of "taylor", all `D ** 2` products."""
    y = np.asarray(x, np.float64)
    kind = phi if isinstance(phi, str) else phi.kind
    if not isinstance(phi, str):
        y = y * phi.scale
        if phi.norm == "length":
            y = unit(y)
        elif phi.norm == "standard":
            y = standard(y)
    raw = y
    if not isinstance(phi, str) and phi.projection is not None:
        y = y @ np.asarray(phi.projection, np.float64).swapaxes(-1, -2)
    offset = 0.0 if isinstance(phi, str) else phi.offset
    if kind == "taylor":
        order = 2 if isinstance(phi, str) else phi.order
        c = (1.0, 1.0, 0.5) if isinstance(phi, str) or phi.coefficients is None else phi.coefficients
        parts = [np.full((*y.shape[:-1], 1), c[0] ** 0.5), c[1] ** 0.5 * y]
        if order == 2:
            parts.append(c[2] ** 0.5 * (y[..., :, None] * y[..., None, :]).reshape(*y.shape[:-1], -1))
        return np.concatenate(parts, axis=-1)
    made: dict[str, Any] = {
        "identity": lambda: y,
        "relu": lambda: np.maximum(y, 0),
        "relu2": lambda: np.maximum(y, 0) ** 2,
        "elu1": lambda: np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))),
        "exp": lambda: np.exp(y),
        "silu": lambda: y / (1 + np.exp(-y)),
        "softmax": lambda: softmax(y),
        "softmax_pair": lambda: np.concatenate([softmax(y), softmax(-y)], axis=-1),
        "gaussian": lambda: np.exp(y - (raw**2).sum(axis=-1, keepdims=True) / 2),
    }
    found: Float64 = made[kind]() + offset
    return found


def unit(x: Float64) -> Float64:
    """Rows over their length."""
    found: Float64 = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return found


def standard(x: Float64) -> Float64:
    """Rows less their mean, over their standard deviation."""
    centred = x - x.mean(axis=-1, keepdims=True)
    found: Float64 = centred / np.maximum(centred.std(axis=-1, keepdims=True), 1e-12)
    return found


def pairs(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> tuple[Float64, Float64, Float64]:
    """All three in float64, keys and values repeated for the query heads of their group."""
    qn, kn, vn = (np.asarray(x, np.float64) for x in (q, k, v))
    group = qn.shape[-3] // kn.shape[-3]
    return qn, np.repeat(kn, group, axis=-3), np.repeat(vn, group, axis=-3)


def kept(mask: ArrayLike | None, scores: Float64) -> Float64:
    """1 for keys that count, 0 for others, like scores `[..., H, Lq, Lk]`."""
    if mask is None:
        return np.ones_like(scores)
    m = np.asarray(mask, bool)
    m = m[..., None, None, :] if m.ndim == 2 else m
    if scores.ndim == 3 and m.ndim == 4:
        m = m[0]
    return np.broadcast_to(m, scores.shape).astype(np.float64)


def divided(weights: Float64, eps: float = 0.0) -> Float64:
    """Rows over their sum plus `eps`; zeros where that is 0."""
    total = weights.sum(axis=-1, keepdims=True) + eps
    found: Float64 = np.divide(weights, total, out=np.zeros_like(weights), where=total != 0)
    return found


def convolved(v: Float64, weight: ArrayLike | None, bias: ArrayLike | None, size: Any, first: int = 0) -> Float64:
    """The depthwise convolution of values `[B, H, first + h * w, Dv]` as maps, zeros in the first rows."""
    found = np.zeros_like(v)
    if weight is None:
        return found
    batch, heads, _, dim = v.shape
    w = np.asarray(weight, np.float64)
    if w.ndim == 4 and w.shape[1] == 1:
        w = w[:, 0]
    w = np.broadcast_to(w, (batch, *w.shape[-3:]))
    if w.shape[1] == dim:
        w = np.tile(w, (1, heads, 1, 1))
    b = np.zeros(w.shape[1]) if bias is None else np.asarray(bias, np.float64)
    b = np.tile(b, heads) if len(b) == dim else b
    height, width = size
    kh, kw = w.shape[2:]
    maps = v[:, :, first:].swapaxes(-1, -2).reshape(batch, heads * dim, height, width)
    padded = np.pad(maps, ((0, 0), (0, 0), (kh // 2, kh - 1 - kh // 2), (kw // 2, kw - 1 - kw // 2)))
    total = np.zeros_like(maps) + b[:, None, None]
    for y in range(kh):
        for x in range(kw):
            total += w[:, :, y, x, None, None] * padded[:, :, y : y + height, x : x + width]
    found[:, :, first:] = total.reshape(batch, heads, dim, height * width).swapaxes(-1, -2)
    return found
