"""Retrieval by sparse features from its formula: one row after another, float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def sae_features(
    x: ArrayLike, w_enc: ArrayLike, b_enc: ArrayLike | None, b_dec: ArrayLike | None, top_k: int, relu: bool
) -> list[dict[int, float]]:
    """Features of each row with their activations."""
    x, w_enc = np.asarray(x, np.float64), np.asarray(w_enc, np.float64)
    z = (x - (0 if b_dec is None else np.asarray(b_dec, np.float64))) @ w_enc
    z = z + (0 if b_enc is None else np.asarray(b_enc, np.float64))
    found = []
    for row in z:
        able = [f for f in range(len(row)) if row[f] > 0 or not relu]
        best = sorted(able, key=lambda f: (-row[f], f))[:top_k]
        found.append({f: float(row[f]) for f in best})
    return found


def feature_scores(
    queries: list[dict[int, float]], keys: list[dict[int, float]], idf: bool, stop_share: float
) -> Float64:
    """Score of each key."""
    weights: dict[int, float] = {}
    for row in queries:
        for f, a in row.items():
            weights[f] = weights.get(f, 0.0) + a
    total = len(keys)
    for f in list(weights):
        n = sum(f in row for row in keys)
        if n > stop_share * total:
            del weights[f]
        elif idf:
            weights[f] *= math.log((total - n + 0.5) / (n + 0.5) + 1)
    return np.array([sum(weights.get(f, 0.0) * a for f, a in row.items()) for row in keys])


def s3_feature_retrieve(
    q: ArrayLike,
    k: ArrayLike,
    w_enc: ArrayLike,
    *,
    b_enc: ArrayLike | None = None,
    b_dec: ArrayLike | None = None,
    top_k: int = 32,
    relu: bool = True,
    idf: bool = True,
    stop_share: float = 1.0,
    radius: int = 8,
    span: int = 64,
    token_budget: int = 1024,
    text_scores: ArrayLike | None = None,
    fusion: str = "rrf",
    weight: float = 0.5,
) -> tuple[list[tuple[int, int]], Float64]:
    """Spans and scores of positions; see `longattn.retrieval`."""
    q, k, w_enc = (np.asarray(x, np.float64) for x in (q, k, w_enc))
    if q.ndim == 2:
        q, k, w_enc = q[None], k[None], w_enc[None]
        b_enc, b_dec = (None if x is None else np.asarray(x)[None] for x in (b_enc, b_dec))
    scores = np.zeros(k.shape[1])
    for layer in range(len(q)):
        own = [None if x is None else np.asarray(x)[layer] for x in (b_enc, b_dec)]
        found = [sae_features(x[layer], w_enc[layer], own[0], own[1], top_k, relu) for x in (q, k)]
        scores += feature_scores(found[0], found[1], idf, stop_share)
    fused = scores
    if text_scores is not None:
        fused = fuse(scores, np.asarray(text_scores, np.float64), fusion, weight)
    return spans_of(fused, token_budget, span, radius), scores


def fuse(first: Float64, second: Float64, fusion: str, weight: float, constant: float = 60.0) -> Float64:
    """One score of two."""
    if fusion == "rrf":
        total = np.zeros(len(first))
        for x in (first, second):
            for rank, n in enumerate(sorted(range(len(x)), key=lambda n: (-x[n], n)), start=1):
                total[n] += 1 / (constant + rank)
        return total
    parts = [(x - x.min()) / (np.ptp(x) or 1.0) for x in (first, second)]
    mixed: Float64 = weight * parts[0] + (1 - weight) * parts[1]
    return mixed


def bm25(query: list[int], documents: list[list[int]], k1: float = 1.5, b: float = 0.75) -> Float64:
    """Scores of documents."""
    mean = sum(map(len, documents)) / max(len(documents), 1)
    scores = np.zeros(len(documents))
    for n, document in enumerate(documents):
        for token in query:
            with_token = sum(token in other for other in documents)
            idf = math.log((len(documents) - with_token + 0.5) / (with_token + 0.5) + 1)
            times = document.count(token)
            scores[n] += idf * times * (k1 + 1) / (times + k1 * (1 - b + b * len(document) / mean)) if times else 0.0
    return scores


def spans_of(scores: Float64, token_budget: int, span: int, radius: int) -> list[tuple[int, int]]:
    """Greedy spans around the best smoothed positions."""
    count = len(scores)
    smooth = [scores[max(n - radius, 0) : n + radius + 1].mean() for n in range(count)]
    taken: set[int] = set(range(count)) if token_budget >= count else set()
    left = 0 if taken else token_budget
    for middle in sorted(range(count), key=lambda n: (-smooth[n], n)):
        if left == 0:
            break
        if middle in taken:
            continue
        start = min(max(middle - span // 2, 0), max(count - span, 0))
        free = [n for n in range(start, min(start + span, count)) if n not in taken]
        free = sorted(free, key=lambda n: (abs(n - middle), n))[:left]
        taken.update(free)
        left -= len(free)
    found: list[tuple[int, int]] = []
    for n in sorted(taken):
        if found and found[-1][1] == n:
            found[-1] = (found[-1][0], n + 1)
        else:
            found.append((n, n + 1))
    return found
