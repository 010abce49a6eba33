"""`parallel_self_cross_attention`, its positions and its pooling from their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, linear, softmax, wide


def _network(x: Float64, layers: Any) -> Float64:
    for n, w in enumerate(layers):
        x = linear(np.maximum(x, 0) if n else x, w)
    return x


def parallel_self_cross_attention(
    a: ArrayLike,
    b: ArrayLike,
    wq: Any,
    wk: Any,
    wv: Any,
    fuse: Any,
    *,
    heads: int,
    update: Any = None,
    scale: float | None = None,
) -> tuple[Float64, Float64]:
    """See `longattn.vision.parallel_self_cross_attention`."""
    new = []
    for x, y in ((wide(a), wide(b)), (wide(b), wide(a))):
        both = [attend(linear(x, wq), linear(z, wk), linear(z, wv), heads, scale) for z in (x, y)]
        f = _network(np.concatenate(both, axis=-1), fuse)
        new.append(x + (f if update is None else _network(np.concatenate([x, f], axis=-1), update)))
    return new[0], new[1]


def wave_position_encoding(x: ArrayLike, positions: ArrayLike, amplitude: Any, phase: Any, combine: Any) -> Float64:
    """See `longattn.vision.wave_position_encoding`."""
    size, angle = _network(wide(x), amplitude), _network(wide(positions), phase)
    return wide(x) + _network(np.concatenate([size * np.cos(angle), size * np.sin(angle)], axis=-1), combine)


def attentional_pool(
    x: ArrayLike, q: ArrayLike, k: ArrayLike, *, ratio: float, gate: bool = False, scale: float | None = None
) -> Float64:
    """The descriptors of `longattn.vision.attentional_pool`."""
    a, b = wide(q), wide(k)
    b = np.repeat(b, a.shape[1] // b.shape[1], axis=1)
    factor = a.shape[-1] ** -0.5 if scale is None else scale
    weights = softmax(factor * (a @ b.swapaxes(-1, -2)))
    score = weights.mean(axis=(1, 2)) * b.shape[2] - 1
    kept = np.sort(np.argsort(-score, axis=1, kind="stable")[:, : max(1, round(ratio * b.shape[2]))], axis=1)
    rows = np.take_along_axis(wide(x), kept[..., None], axis=1)
    return rows / (1 + np.exp(-np.take_along_axis(score, kept, axis=1)))[..., None] if gate else rows
