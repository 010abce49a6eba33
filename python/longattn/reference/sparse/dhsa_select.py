"""DHSA from its formulas: float64 numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def dhsa_select(
    q: ArrayLike,
    k: ArrayLike,
    *,
    budget: int,
    boundaries: Any = 64,
    block_q: int = 64,
    n_local: int = 128,
    n_global: int = 128,
    instruction_tokens: int = 64,
    per_head: bool = False,
) -> NDArray[np.bool_]:
    """See `longattn.sparse.dhsa_select`; the lists as booleans `[B, H or 1, Lq, Lk]`."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    _, heads, rows, _ = q.shape
    keys = k.shape[2]
    if isinstance(boundaries, int):
        boundaries = [*range(0, keys, boundaries), keys]
    bounds = np.asarray(boundaries)
    lengths = np.diff(bounds)
    sums = np.concatenate([np.zeros_like(k[:, :, :1]), np.cumsum(k, axis=2)], axis=2)  # prefix sums
    of_k = (sums[:, :, bounds[1:]] - sums[:, :, bounds[:-1]]) / np.sqrt(lengths)[:, None]
    parts = [slice(i, min(i + block_q, rows)) for i in range(0, rows, block_q)]
    of_q = np.stack([q[:, :, part].sum(axis=2) / np.sqrt(part.stop - part.start) for part in parts], axis=2)
    if per_head:
        of_k = np.repeat(of_k, heads // k.shape[1], axis=1)
    else:
        of_q, of_k = of_q.mean(axis=1, keepdims=True), of_k.mean(axis=1, keepdims=True)
    scores = np.repeat(of_q @ of_k.swapaxes(-1, -2), lengths, axis=3)  # [B, H, blocks, Lk]
    mask = np.zeros((*scores.shape[:2], rows, keys), bool)
    j = np.arange(keys)
    for b, h, i in np.ndindex(scores.shape[:3]):
        end = np.clip(parts[i].stop + keys - rows, 0, keys)
        listed = (j < end) & ((j < n_global) | (j >= end - n_local))
        for key in np.argsort(-scores[b, h, i], kind="stable"):
            if listed.sum() >= budget:
                break
            listed[key] |= key < end
        if parts[i].stop > rows - instruction_tokens:
            listed = j < end
        mask[b, h, parts[i]] = listed
    return mask


def boundary_logits(keys: ArrayLike, weights: Mapping[str, ArrayLike], *, window: int = 4) -> NDArray[np.float64]:
    """See `longattn.sparse.boundary_logits`."""
    x = np.asarray(keys, np.float64)
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    length, dim = x.shape

    def encode(first: int) -> NDArray[np.float64]:
        mixed = np.zeros(dim)
        for t in range(window):
            if 0 <= first + t < length:
                mixed += w["depthwise"][t] * x[first + t]
        encoded: NDArray[np.float64] = np.maximum(w["pointwise"] @ mixed + w["pointwise_bias"], 0)
        return encoded

    logits = []
    for j in range(length - 1):
        left, right = encode(j - window + 1), encode(j + 1)
        norms = np.linalg.norm(left) * np.linalg.norm(right)
        cosine = left @ right / norms if norms else 0.0
        features = np.concatenate([left, right, np.abs(left - right), left * right, [cosine]])
        hidden = np.maximum(w["hidden"] @ features + w["hidden_bias"], 0)
        logits.append(w["output"] @ hidden + w["output_bias"])
    return np.array(logits, np.float64)


def pick_boundaries(scores: ArrayLike, n_chunks: int, *, half_width: int = 8) -> list[int]:
    """See `longattn.sparse.pick_boundaries`."""
    x = np.asarray(scores, np.float64)
    left = set(range(len(x)))
    picked: list[int] = []
    while left and len(picked) < n_chunks - 1:
        best = max(left, key=lambda gap: (x[gap], -gap))
        picked.append(best + 1)
        left -= set(range(best - half_width, best + half_width + 1))
    return [0, *sorted(picked), len(x) + 1]


def boundary_labels(attention: ArrayLike, *, window: int = 4, eps: float = 1e-6) -> NDArray[np.float64]:
    """The ratios of `longattn.sparse.boundary_ratios`."""
    a = np.asarray(attention, np.float64)
    length = len(a)
    ratios = []
    for j in range(length - 1):
        later = a[j + window + 1 :]
        past = later[:, max(0, j - window + 1) : j + 1].sum()
        future = later[:, j + 1 : j + window + 1].sum()
        ratios.append((max(past, future) + eps) / (min(past, future) + eps))
    return np.array(ratios, np.float64)
