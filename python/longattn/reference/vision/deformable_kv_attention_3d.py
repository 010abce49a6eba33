"""`deformable_kv_attention_3d` and `point_attention` from their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.deformable_kv_attention_2d import offset_positions
from longattn.reference.vision.layers import Float64, attend, flat, linear, places, sample, softmax, wide


def deformable_kv_attention_3d(
    z: ArrayLike,
    wq: Any,
    wk: Any,
    wv: Any,
    *,
    heads: int,
    offset_kernel: ArrayLike,
    offset_weights: ArrayLike,
    offset_norm: Any = None,
    modality: ArrayLike | None = None,
    stride: int = 1,
    range_factor: float = 2.0,
    reference: str = "corners",
    wo: Any = None,
) -> Float64:
    """See `longattn.vision.deformable_kv_attention_3d`."""
    a = wide(z)
    at = offset_positions(a, offset_kernel, offset_weights, offset_norm, stride, range_factor, reference)
    tokens, samples = flat(a), sample(a, at)
    if modality is not None:
        tokens, samples = (np.concatenate([wide(modality), rows], axis=1) for rows in (tokens, samples))
    return linear(attend(linear(tokens, wq), linear(samples, wk), linear(samples, wv), heads), wo)


def point_attention(
    z: ArrayLike, wv: Any, offsets: Any, weights: Any, *, heads: int, points: int = 4, wo: Any = None
) -> Float64:
    """See `longattn.vision.point_attention`."""
    a = wide(z)
    extents = a.shape[1:-1]
    values = linear(a, wv)
    by = flat(linear(a, offsets)).reshape(len(a), -1, points, heads, len(extents))
    logits = flat(linear(a, weights)).reshape(len(a), -1, points, heads)
    shares = softmax(np.moveaxis(logits, 2, -1))
    parts = []
    for head, v in enumerate(np.split(values, heads, axis=-1)):
        at = places(extents)[None, :, None] + by[:, :, :, head]
        parts.append(np.einsum("bnp,bnpc->bnc", shares[:, :, head], sample(v, at, coordinates="pixel")))
    return linear(np.concatenate(parts, axis=-1).reshape(*a.shape[:-1], -1), wo)
