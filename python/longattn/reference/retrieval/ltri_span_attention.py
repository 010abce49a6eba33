"""Attention over retrieved spans from its formula: one span, one row after another, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def triangle_score(attn: ArrayLike, first: int, last: int, theta: float) -> float:
    """Sum of `attn - theta` over the triangle of the tokens `first` to `last`."""
    a = np.asarray(attn, np.float64)
    return float(sum(a[i, j] - theta for i in range(first, last + 1) for j in range(first, i + 1)))


def discover_spans(
    attn: ArrayLike, min_len: int, max_len: int, theta: float | None, iou: float
) -> list[tuple[int, int]]:
    """Spans that tile the segment."""
    a = np.asarray(attn, np.float64)
    n = len(a)
    if theta is None:
        theta = 1 / max(n, 1)
    candidates = []
    for first in range(n):
        for size in range(min_len, min(max_len, n - first) + 1):
            score = triangle_score(a, first, first + size - 1, theta)
            if score > 0:
                candidates.append((-score, first, size))
    owner = [-1] * n
    chosen: list[tuple[int, int]] = []
    for _, first, size in sorted(candidates):
        stop = first + size
        shares = []
        for other, end in chosen:
            common = max(0, min(stop, end) - max(first, other))
            shares.append(common / (size + end - other - common))
        if any(share > iou for share in shares):
            continue
        for token in range(first, stop):
            if owner[token] < 0:
                owner[token] = len(chosen)
        chosen.append((first, stop))
    spans: list[tuple[int, int]] = []
    for token in range(n):
        if token and owner[token] == owner[token - 1]:
            spans[-1] = (spans[-1][0], token + 1)
        else:
            spans.append((token, token + 1))
    return spans


def ltri_span_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, spans: ArrayLike, representatives: ArrayLike, **options: Any
) -> Any:
    """Sinks, spans of the best representatives and a window in one softmax; see `longattn.retrieval`."""
    return span_attention(q, k, v, spans, representatives, **options)


def span_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    spans: ArrayLike,
    representatives: ArrayLike,
    *,
    sinks: int = 4,
    window: int = 512,
    budget: int = 1024,
    block: int = 1,
    group_reduce: str = "max",
    row_reduce: str = "max",
    scale: float | None = None,
    return_lse: bool = False,
    rope_base: float | None = None,
) -> Any:
    """`ltri_span_attention`; with `rope_base` as `longattn.retrieval.LtriCache` with positions of its own.

    Keys and queries then come unrotated and get the positions that they have among the rows attended to.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    spans, representatives = np.asarray(spans), np.asarray(representatives)
    heads, rows, dim = q.shape
    kv_heads, keys = k.shape[:2]
    group, factor = heads // kv_heads, dim**-0.5 if scale is None else scale
    indexed = int(spans[-1, 1]) if len(spans) else 0
    out, lse = np.zeros((heads, rows, v.shape[2])), np.zeros((heads, rows))
    for at in range(0, rows, block):
        some = range(at, min(at + block, rows))
        first, end = keys - rows + some[0], keys - rows + some[-1] + 1
        near = max(0, min(first - window + 1, indexed))
        for kv in range(kv_heads):
            of_group = range(kv * group, (kv + 1) * group)
            ranked = []
            for n, (start, stop) in enumerate(spans):
                kept = range(max(start, sinks), min(stop, near))
                if kept:
                    best = [[max(q[h, r] @ k[kv, j] for j in representatives[n]) for r in some] for h in of_group]
                    over_rows = np.mean(best, axis=1) if row_reduce == "mean" else np.max(best, axis=1)
                    score = over_rows.sum() if group_reduce == "sum" else over_rows.max()
                    ranked.append((-score, n, kept))
            left, read = budget, list(range(min(sinks, near)))
            for _, _, kept in sorted(ranked, key=lambda entry: entry[:2]):
                if len(kept) <= left:
                    left -= len(kept)
                    read += kept
            read = sorted(read) + list(range(near, end))
            for h in of_group:
                for r in some:
                    position = keys - rows + r
                    seen = [j for j in read if j <= position]
                    query, theirs = q[h, r], k[kv, seen]
                    if rope_base is not None:
                        theirs = np.array([_rotated(row, place, rope_base) for place, row in enumerate(theirs)])
                        query = _rotated(query, len(seen) - 1, rope_base)
                    s = factor * (theirs @ query)
                    p = np.exp(s - s.max())
                    out[h, r], lse[h, r] = p @ v[kv, seen] / p.sum(), s.max() + np.log(p.sum())
    return (out, lse) if return_lse else out


def _rotated(x: Float64, position: int, base: float) -> Float64:
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag])
