"""HaloNet's attention from its formula: float64 numpy, one query at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def halo_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    block: int = 8,
    halo: int = 3,
    rel_h: ArrayLike | None = None,
    rel_w: ArrayLike | None = None,
    scale_rel: bool = False,
    mask_pad: bool = True,
    stride: int = 1,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.halo_attention`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    height, width, dim = q.shape[2:]
    factor = dim**-0.5 if scale is None else scale
    pad = block + halo
    inside = np.pad(np.ones((height, width), bool), pad)
    k, v = (np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad), (0, 0))) for x in (k, v))
    rows, columns = range(0, height, stride), range(0, width, stride)
    out = np.zeros((*q.shape[:2], len(rows), len(columns), v.shape[-1]))
    lse = np.zeros(out.shape[:-1])
    side = block + 2 * halo
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            top, left = y // block * block - halo, x // block * block - halo
            region = (..., slice(top + pad, top + pad + side), slice(left + pad, left + pad + side), slice(None))
            query = q[:, :, y, x]
            logits = factor * np.einsum("bhd,bhyxd->bhyx", query, k[region])
            if rel_h is not None and rel_w is not None:
                dy = top + np.arange(side) - y + pad - 1
                dx = left + np.arange(side) - x + pad - 1
                scaled = query * factor if scale_rel else query
                logits += np.einsum("bhd,yd->bhy", scaled, np.asarray(rel_h, np.float64)[dy])[..., None]
                logits += np.einsum("bhd,xd->bhx", scaled, np.asarray(rel_w, np.float64)[dx])[..., None, :]
            if mask_pad:
                logits = np.where(inside[region[1:3]], logits, -np.inf)
            top_logit = logits.max(axis=(-2, -1), keepdims=True)
            weights = np.exp(logits - top_logit)
            total = weights.sum(axis=(-2, -1))
            out[:, :, i, j] = np.einsum("bhyx,bhyxd->bhd", weights, v[region]) / total[..., None]
            lse[:, :, i, j] = top_logit[..., 0, 0] + np.log(total)
    return (out, lse) if return_lse else out
