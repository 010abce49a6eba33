"""Weights by distance, pair after pair."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def attention_distances(
    q: Any, k: Any, rows: Any, *, size: tuple[int, int] | None = None, causal: bool = False
) -> dict[str, Float64]:
    """See `longattn.diagnostics`, of the plain logits `D ** -0.5 q . k`."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    k = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
    keys, width = k.shape[-2], k.shape[-2] if size is None else size[1]
    pairs: dict[int, int] = {}
    sums: dict[int, Float64] = {}
    for row in rows:
        at = keys - q.shape[-2] + int(row) % q.shape[-2]
        logits = (k @ q[..., int(row), :, None])[..., 0] * q.shape[-1] ** -0.5
        seen = range(at + 1 if causal else keys)
        e = np.exp(logits[..., : len(seen)] - logits[..., : len(seen)].max(axis=-1, keepdims=True))
        weights = e / e.sum(axis=-1, keepdims=True)
        for j in seen:
            d = round(float(np.hypot(at // width - j // width, at % width - j % width)))
            pairs[d] = pairs.get(d, 0) + 1
            sums[d] = sums.get(d, np.zeros(weights.shape[:-1])) + weights[..., j]
    found = {d: sums[d] / pairs[d] for d in pairs}
    constant = np.min(list(found.values()), axis=0)
    total = np.sum(list(sums.values()), axis=0)
    return {
        "pairs": np.array([pairs.get(d, 0) for d in range(max(pairs) + 1)]),
        "means": np.stack([found.get(d, 0 * constant) for d in range(max(pairs) + 1)], axis=-1),
        "constant": constant,
        "local": np.sum([sums[d] - constant * pairs[d] for d in pairs], axis=0) / total,
        "distance": np.sum([d * sums[d] for d in pairs], axis=0) / total,
    }
