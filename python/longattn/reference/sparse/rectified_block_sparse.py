"""Rectified block-sparse attention from its formulas: float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention
from longattn.reference.sparse.choosing import fewest, means, softmax, spans


def _deviations(x: NDArray[np.float64], mean: NDArray[np.float64], parts: list[slice]) -> NDArray[np.float64]:
    return np.stack([np.abs(x[:, :, p] - mean[:, :, i : i + 1]).mean(axis=2) for i, p in enumerate(parts)], axis=2)


def rectified_block_sparse(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    text: int = 0,
    block: int = 128,
    tau: float = 0.6,
    top_k: int = 1,
    neighbours: ArrayLike | None = None,
    first_frame_blocks: int = 0,
    selector: Any = None,
    compensate: str = "certain",
    weigh_last: bool = True,
    scale: float | None = None,
) -> NDArray[np.float64]:
    """See `longattn.sparse.rectified_block_sparse`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    video = tokens - text
    factor = q.shape[3] ** -0.5 if scale is None else scale
    parts = spans(video, block)
    n = len(parts)
    counts = np.array([p.stop - p.start if weigh_last else block for p in parts])
    vq, vk = q[:, :, :video], k[:, :, :video]
    mean_q, mean_k, mean_v = (means(x[:, :, :video], block) for x in (q, k, v))
    p = softmax(factor * mean_q @ np.concatenate([mean_k, k[:, :, video:]], axis=2).swapaxes(-1, -2))
    z = (counts * p[..., :n]).sum(axis=-1) + p[..., n:].sum(axis=-1)
    shares = counts * p[..., :n] / z[..., None]
    marks = np.zeros((n, n), bool) if neighbours is None else np.asarray(neighbours, bool).copy()
    marks[:first_frame_blocks, :first_frame_blocks] = True
    dots = mean_q @ mean_k.swapaxes(-1, -2)
    error = np.abs(_deviations(vq, mean_q, parts) @ mean_k.swapaxes(-1, -2))
    error = error + np.abs(mean_q @ _deviations(vk, mean_k, parts).swapaxes(-1, -2))
    chosen = None
    if selector is not None:
        dense = selector(vq, vk[:, ::group], causal=False, scale=factor).to_dense_mask()
        dense = np.repeat(np.broadcast_to(dense, (len(q), *dense.shape[1:])), q.shape[1] // dense.shape[1], axis=1)
        chosen = dense[:, :, ::block, ::block]
    mask = np.ones((*q.shape[:2], tokens, tokens), bool)
    out_of_means, left = np.zeros(v.shape), np.ones(q.shape[:3])
    for b, h, m in np.ndindex(*q.shape[:2], n):
        best = fewest(shares[b, h, m], tau, np.zeros(n, bool), least=max(top_k, 1))
        taken = (best if chosen is None else chosen[b, h, m]) | marks[m]
        mask[b, h, parts[m], :video] = np.repeat(taken, [x.stop - x.start for x in parts])
        if compensate == "certain":
            made_up = ~taken & (np.abs(dots[b, h, m]) > error[b, h, m])
            out_of_means[b, h, parts[m]] = shares[b, h, m, made_up] @ mean_v[b, h, made_up]
            left[b, h, parts[m]] = 1 - shares[b, h, m, made_up].sum()
    kept: NDArray[np.float64] = attention(q, k, v, mask=mask, scale=scale)
    return left[..., None] * kept + out_of_means
