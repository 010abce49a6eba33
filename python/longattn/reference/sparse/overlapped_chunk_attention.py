"""Overlapped windows and kernel pooling from their formulas: one window, one region after another, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention

Float64 = NDArray[np.float64]


def overlapped_chunk_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    chunk: int = 40,
    overlap: int = 5,
    scale: float | None = None,
    lengths: ArrayLike | None = None,
    packed: bool = True,
) -> Float64:
    """Each chunk's terms over the chunk and its neighbours; see `longattn.sparse`. `packed` changes nothing here."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if q.ndim == 3:
        whole: Float64 = overlapped_chunk_attention(
            q[None], k[None], v[None], chunk=chunk, overlap=overlap, scale=scale, lengths=lengths
        )[0]
        return whole
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b in range(len(q)):
        length = q.shape[2] if lengths is None else int(np.asarray(lengths)[b])
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            window = slice(max(start - overlap, 0), min(start + chunk + overlap, length))
            out[b, :, start:stop] = attention(q[b, :, start:stop], k[b, :, window], v[b, :, window], scale=scale)
    return out


def kernel_pool(
    query: ArrayLike,
    document: ArrayLike,
    mu: ArrayLike,
    sigma: ArrayLike,
    kernel_weights: ArrayLike,
    *,
    saturation: ArrayLike | None = None,
    query_salience: ArrayLike | None = None,
    region_weights: ArrayLike | None = None,
    region: int = 30,
    stride: int = 2,
    best: int = 3,
) -> tuple[float, Float64]:
    """Score of a document and scores of its regions; see `longattn.sparse`."""
    q, d = np.asarray(query, np.float64), np.asarray(document, np.float64)
    mu, sigma, kernel_weights = (np.asarray(x, np.float64) for x in (mu, sigma, kernel_weights))
    norms = [np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (q, d)]
    cosine = (q / norms[0]) @ (d / norms[1]).T
    kernels = np.exp(-((cosine[..., None] - mu) ** 2) / (2 * sigma**2))
    starts = list(range(0, max(len(d) - region, 0) + 1, stride)) if len(d) else []
    scores = np.zeros(len(starts))
    for n, start in enumerate(starts):
        inside = kernels[:, start : start + region]
        total = 0.0
        for i in range(len(q)):
            x = inside[i].sum(axis=0)
            if saturation is not None:
                salience = 0.0 if query_salience is None else float(np.asarray(query_salience)[i])
                features = np.array([salience, inside.shape[1], 1.0])
                a, b, c = np.asarray(saturation, np.float64) @ features
                x = a * np.maximum(x, 1e-10) ** (1 / b) - c
            total += float(kernel_weights @ x)
        scores[n] = total
    weights = np.ones((best, 5)) if region_weights is None else np.asarray(region_weights, np.float64)
    left, apart, found = scores.copy(), -(-region // stride), 0.0
    for rank in range(best):
        if not (left > -np.inf).any():
            break
        top = int(left.argmax())
        for offset in range(-2, 3):
            if 0 <= top + offset < len(scores):
                found += weights[rank, offset + 2] * scores[top + offset]
        left[max(top - apart + 1, 0) : top + apart] = -np.inf
    return found, scores
