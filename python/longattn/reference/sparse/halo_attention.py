"""HaloNet's attention from its formula: float64 numpy, one query at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def halo_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    block: int | Sequence[int] = 8,
    halo: int | Sequence[int] = 3,
    relative: Sequence[ArrayLike] | None = None,
    scale_rel: bool = False,
    mask_pad: bool = True,
    stride: int | Sequence[int] = 1,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.halo_attention`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    *shape, dim = q.shape[2:]
    n = len(shape)
    sizes, rims, steps = (np.broadcast_to(np.asarray(x), n) for x in (block, halo, stride))
    factor = dim**-0.5 if scale is None else scale
    pads = [(int(b + h),) * 2 for b, h in zip(sizes, rims, strict=True)]
    inside = np.pad(np.ones(shape, bool), pads)
    k, v = (np.pad(x, ((0, 0), (0, 0), *pads, (0, 0))) for x in (k, v))
    rows = [range(0, length, int(step)) for length, step in zip(shape, steps, strict=True)]
    out = np.zeros((*q.shape[:2], *map(len, rows), v.shape[-1]))
    lse = np.zeros(out.shape[:-1])
    for at in np.ndindex(*map(len, rows)):
        x = np.array([r[i] for r, i in zip(rows, at, strict=True)])
        first = x // sizes * sizes - rims
        sides = sizes + 2 * rims
        region = tuple(slice(int(f + p[0]), int(f + p[0] + s)) for f, p, s in zip(first, pads, sides, strict=True))
        query = q[(slice(None), slice(None), *x)]
        logits = factor * np.einsum("bhd,bh...d->bh...", query, k[(slice(None), slice(None), *region)])
        if relative is not None:
            scaled = query * factor if scale_rel else query
            for a, table in enumerate(relative):
                distance = first[a] + np.arange(sides[a]) - x[a] + pads[a][0] - 1
                part = np.einsum("bhd,yd->bhy", scaled, np.asarray(table, np.float64)[distance])
                logits += part.reshape(*part.shape[:2], *(1,) * a, -1, *(1,) * (n - 1 - a))
        if mask_pad:
            logits = np.where(inside[region], logits, -np.inf)
        axes = tuple(range(2, 2 + n))
        top = logits.max(axis=axes, keepdims=True)
        weights = np.exp(logits - top)
        total = weights.sum(axis=axes)
        values = v[(slice(None), slice(None), *region)]
        place = (slice(None), slice(None), *at)
        flat = values.reshape(*values.shape[:2], -1, values.shape[-1])
        out[place] = np.einsum("bhn,bhnd->bhd", weights.reshape(flat.shape[:3]), flat) / total[..., None]
        lse[place] = top.reshape(total.shape) + np.log(total)
    return (out, lse) if return_lse else out
