"""The loss that hash weights are trained by: float64 numpy, a query and a key at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def hash_loss(
    weights: ArrayLike,
    queries: ArrayLike,
    keys: ArrayLike,
    sharpness: float = 0.1,
    similarity: float = 0.01,
    balance: float = 1.0,
    orthogonality: float = 2.0,
) -> float:
    """Mean loss of queries `[b, D]` with keys `[n, D]` and weights `[D, bits]`, as in `train_hash_weights`."""
    w, qs, ks = (np.asarray(x, np.float64) for x in (weights, queries, keys))
    n, bits = len(ks), w.shape[1]
    own = max(1, round(0.1 * n))

    def code(x: np.ndarray) -> np.ndarray:
        relaxed: np.ndarray = 2 / (1 + np.exp(-sharpness * (x @ w))) - 1
        return relaxed

    total = 0.0
    for q in qs:
        order = np.argsort(-(ks @ q), kind="stable")
        label = np.full(n, -1.0)
        label[order[:own]] = np.linspace(20, 1, own)
        apart = [label[j] * ((code(q) - code(ks[j])) ** 2).sum() for j in range(n)]
        lean = sum((code(q) + code(k)) / (n * bits) for k in ks)
        total += similarity * float(np.mean(apart)) + balance * float((lean**2).sum())
    return total / len(qs) + orthogonality * float(np.linalg.norm(w.T @ w - np.eye(bits)))
