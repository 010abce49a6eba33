"""`feature_cluster_attention` and `balanced_clusters` from their rules, cluster by cluster."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.vision.layers import Float64, attend, softmax, wide


def balanced_clusters(x: ArrayLike, levels: int) -> NDArray[np.int64]:
    """See `longattn.vision.balanced_clusters`."""
    a = wide(x)
    order = np.zeros(a.shape[:3], np.int64)
    for b, h in np.ndindex(*a.shape[:2]):
        clusters = [np.arange(a.shape[2])]
        for _ in range(levels):
            clusters = [half for one in clusters for half in _halves(a[b, h], one)]
        order[b, h] = np.concatenate(clusters)
    return order


def _halves(x: Float64, members: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    rows, middle = x[members], len(members) // 2

    def unit(a: Float64) -> Float64:
        return np.asarray(a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12))

    centres = unit(np.stack([rows[:middle].mean(axis=0), rows[middle:].mean(axis=0)]))
    for _ in range(2):
        centres = unit(softmax(100 * unit(rows) @ centres.T).T @ rows)
    s = unit(rows) @ centres.T
    order = np.argsort((s[:, 0] + 1) / (s[:, 1] + 1), kind="stable")
    return [members[order[:middle]], members[order[middle:]]]


def feature_cluster_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    cluster: int = 49,
    overlap: int = 20,
    scale: float | None = None,
    order: ArrayLike | None = None,
) -> Float64:
    """See `longattn.vision.feature_cluster_attention`."""
    q, k, v = wide(q), wide(k), wide(v)
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    count = q.shape[2] // cluster
    by = balanced_clusters(q, count.bit_length() - 1) if order is None else np.asarray(order)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, h in np.ndindex(*q.shape[:2]):
        for c in range(count):
            own = by[b, h, c * cluster : (c + 1) * cluster]
            seen = own
            if count > 1 and c % 2 == 0:
                seen = by[b, h, c * cluster : (c + 1) * cluster + overlap]
            elif count > 1:
                seen = by[b, h, c * cluster - overlap : (c + 1) * cluster]
            out[b, h, own] = attend(q[b, h, own], k[b, h, seen], v[b, h, seen], 1, scale)
    return out
