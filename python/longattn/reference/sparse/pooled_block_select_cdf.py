"""Blocks of patches by means, and special tokens, from the formulas: float64 numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention
from longattn.reference.sparse.choosing import fewest, pooled, softmax


def patch_mask(
    q: ArrayLike,
    k: ArrayLike,
    *,
    frames: int,
    special: int = 5,
    tau: float | None = 0.97,
    rho: float | None = 0.1,
    block_q: int = 128,
    block_k: int = 64,
    order: ArrayLike | None = None,
    scale: float | None = None,
) -> NDArray[np.bool_]:
    """Which tokens attend to which, `[B, Hq, N, N]`."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, heads, tokens, dim = q.shape
    length = tokens // frames
    inside = np.arange(length - special) if order is None else np.asarray(order)
    patches = np.concatenate([f * length + special + inside for f in range(frames)])
    others = np.setdiff1d(np.arange(tokens), patches)
    count = len(patches)
    scores = softmax(
        pooled(q[:, :, patches], k[:, :, patches], block_q, block_k, dim**-0.5 if scale is None else scale)
    )
    groups = scores.shape[3]
    share = 0.0 if tau is None else tau
    least = 1 if rho is None else max(1, int(np.floor(groups * (1 - rho) + 1e-9)))
    mask = np.zeros((batch, heads, tokens, tokens), bool)
    mask[:, :, others] = True
    mask[..., others] = True
    forced = np.zeros(groups, bool)
    forced[count // block_k :] = len(others) > 0
    for b, h, i in np.ndindex(*scores.shape[:3]):
        taken = fewest(scores[b, h, i], share, np.zeros(groups, bool), least=least) | forced
        keys = patches[np.repeat(taken, block_k)[:count]]
        mask[b, h][np.ix_(patches[i * block_q : (i + 1) * block_q], keys)] = True
    return mask


def pooled_block_select_cdf(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    frames: int,
    special: int = 5,
    tau: float | None = 0.97,
    rho: float | None = 0.1,
    block_q: int = 128,
    block_k: int = 64,
    order: ArrayLike | None = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    """See `longattn.sparse.pooled_block_select_cdf`."""
    mask = patch_mask(
        q, k, frames=frames, special=special, tau=tau, rho=rho, block_q=block_q, block_k=block_k, order=order,
        scale=scale,
    )  # fmt: skip
    out: NDArray[np.float64] = attention(q, k, v, mask=mask, scale=scale)
    return out
