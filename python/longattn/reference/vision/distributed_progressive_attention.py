"""`distributed_progressive_attention` from its formula, region by region."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, flat, inner_places, linear, places, wide


def distributed_progressive_attention(
    content: ArrayLike,
    style: ArrayLike,
    distributed: Any,
    progressive: Any,
    *,
    heads: int = 8,
    region: int = 8,
    alpha: float = 1.0,
    beta: float = 0.0,
    scale: float = 1.0,
) -> Float64:
    """See `longattn.vision.distributed_progressive_attention`."""
    c, s = wide(content), wide(style)

    def normalised(x: Float64) -> Float64:
        ddof = min(1, x.shape[1] * x.shape[2] - 1)
        out: Float64 = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True, ddof=ddof) + 1e-5)
        return out

    def members(x: Float64) -> list[Any]:
        extents = np.array(x.shape[1:3])
        numbers = np.ravel_multi_index(tuple((places(extents) // region).T), tuple(extents // region))
        inner = inner_places(extents, (region, region))
        return [sorted(np.flatnonzero(numbers == n), key=lambda p: inner[p]) for n in range(numbers.max() + 1)]

    def split(x: Float64) -> Float64:
        return x.reshape(*x.shape[:2], heads, -1)

    of_c, of_s = members(c), members(s)
    wq, wk, wv, wo = distributed
    q, k, v = flat(linear(normalised(c), wq)), split(flat(linear(normalised(s), wk))), split(flat(linear(s, wv)))
    keys, values = [], []
    for z in of_s:
        kc, vc = k[:, z].mean(axis=1), v[:, z].mean(axis=1)
        g = 1 / (1 + np.exp(-(beta + alpha * np.einsum("bhd,bjhd->bjh", kc, k[:, z]))))[..., None]
        keys.append(((g * k[:, z]).sum(axis=1) + kc) / (region**2 + 1))
        values.append(((g * v[:, z]).sum(axis=1) + vc) / (region**2 + 1))
    centres, means = (np.stack(a, axis=1).reshape(len(c), len(of_s), -1) for a in (keys, values))
    out = linear(attend(q, centres, means, heads, scale), wo)

    wq, wk, wv, wo = progressive
    q, k, v = split(flat(linear(normalised(c), wq))), split(flat(linear(normalised(s), wk))), split(flat(linear(s, wv)))
    found = np.zeros((len(c), q.shape[1], heads, v.shape[-1]))
    for b, h in np.ndindex(len(c), heads):
        for x in of_c:
            z = of_s[int(np.argmax([(q[b, x, h] * k[b, y, h]).sum() for y in of_s]))]
            found[b, x, h] = attend(q[b, x, h], k[b, z, h], v[b, z, h], 1, scale)
    out = out + linear(found.reshape(out.shape), wo)
    return c + out.reshape(c.shape)
