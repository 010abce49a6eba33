"""`attention_guided_crop` and what belongs to it from their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, sample, softmax, wide


def attention_guided_crop(
    weights: ArrayLike,
    shape: Any,
    *,
    crops: int,
    top: int,
    ratio: Any = (0.5, 0.9),
    temperature: float = 0.03,
    seed: int = 0,
) -> Float64:
    """See `longattn.vision.attention_guided_crop`."""
    generator = np.random.default_rng(seed)
    a = wide(weights)
    draws, (low, high) = generator.random((len(a), crops)), ratio
    shares = generator.uniform(low, high, (len(a), crops, 2))
    boxes = np.zeros((len(a), crops, 4))
    for image, row in enumerate(a):
        best = sorted(range(row.size), key=lambda n: (-row[n], n))[:top]
        p = softmax(row[best] / temperature)
        for n in range(crops):
            place, total = 0, p[0]
            while place < top - 1 and draws[image, n] >= total:
                place += 1
                total += p[place]
            for axis, at in enumerate(divmod(best[place], shape[1])):
                size = shares[image, n, axis] * shape[axis]
                boxes[image, n, axis] = max(at + 0.5 - size / 2, 0)
                boxes[image, n, axis + 2] = min(at + 0.5 + size / 2, shape[axis])
    return boxes


def cls_attention(q: ArrayLike, k: ArrayLike, *, prefix: int = 1, scale: float | None = None) -> Float64:
    """See `longattn.vision.cls_attention`."""
    a, b = wide(q), wide(k)
    b = np.repeat(b, a.shape[1] // b.shape[1], axis=1)
    factor = a.shape[-1] ** -0.5 if scale is None else scale
    weights = softmax(factor * (a @ b.swapaxes(-1, -2)))
    mean: Float64 = weights[:, :, 0, prefix:].mean(axis=1)
    return mean


def crop_features(x: ArrayLike, boxes: ArrayLike, shape: Any) -> Float64:
    """See `longattn.vision.crop_features`."""
    b = wide(boxes)
    at = np.zeros((*b.shape[:2], *shape, 2))
    for y in range(shape[0]):
        for z in range(shape[1]):
            for axis, step in enumerate(((y + 0.5) / shape[0], (z + 0.5) / shape[1])):
                at[:, :, y, z, axis] = b[..., axis] * (1 - step) + b[..., axis + 2] * step - 0.5
    return sample(wide(x), at, coordinates="pixel", padding="border")


def soft_match(similarity: ArrayLike, classes: ArrayLike, *, temperature: float = 0.03) -> Float64:
    """See `longattn.vision.soft_match`."""
    s, ids = wide(similarity) / temperature, np.asarray(classes)
    weighted = (softmax(s) * s).sum(axis=-2)
    return np.stack([weighted[..., ids == n].sum(axis=-1) for n in range(int(ids.max()) + 1)], axis=-1)
