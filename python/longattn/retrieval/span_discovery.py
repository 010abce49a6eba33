"""Spans of text in attention maps: dense triangles, which tokens of each are looked at most."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, integer, real


def triangle_scores(attn: Array, *, max_len: int, theta: float | None = None) -> NDArray[np.float64]:
    """How dense the triangle of each span is in an attention map.

    Args:
        attn: causal attention of a segment to itself, floating `[n, n]`; what lies above the diagonal does not count.
        max_len: most tokens of a span.
        theta: subtracted from each weight, so that spans do not grow for nothing; `None` is `1 / n`, the mean weight of
            the longest row (the paper does not give its number).

    Returns:
        `[n, max_len]`: entry `[x, l]` is the sum of `attn_ij - theta` over `x <= j <= i <= x + l`; minus infinity where
        the span would leave the segment.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: a shape or a number that does not fit.

    Cost:
        `n * n` for sums over prefixes and `n * max_len` for the scores, in float64.
    """
    a, low = _map(attn, theta)
    longest = integer(max_len, "max_len", 1)
    n = len(a)
    lower = np.tril(a - low) if n else a
    sums = np.zeros((n + 1, n + 1))
    sums[1:, 1:] = lower.cumsum(axis=0).cumsum(axis=1)
    first = np.arange(n)[:, None]
    stop = first + np.arange(1, longest + 1)
    inside = np.minimum(stop, n)
    scores = sums[inside, inside] - sums[first, inside] - sums[inside, first] + sums[first, first]
    return np.where(stop <= n, scores, -np.inf)


def discover_spans(
    attn: Array, *, min_len: int = 4, max_len: int = 128, theta: float | None = None, iou: float = 0.3
) -> NDArray[np.int64]:
    """Spans of a segment that its attention map shows as dense triangles; they tile the segment.

    Candidates have a positive score (`triangle_scores`). The best is chosen, candidates that overlap it by more than
    `iou` (intersection over union) drop out, and so on; of equal scores the first, then the shortest. A token that
    several chosen spans hold belongs to the best one; what is left of a span, and what lies between spans, are spans of
    their own.

    Args:
        attn: causal attention of a segment to itself, floating `[n, n]`, the mean of some heads' say.
        min_len: fewest tokens of a candidate.
        max_len: most tokens of a candidate.
        theta: as in `triangle_scores`.
        iou: share from which on an overlap is too much, 0 to below 1 (the paper's number is not known to us).

    Returns:
        int64 `[m, 2]`: first token of each span and the one after its last.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: a shape or a number that does not fit.

    Cost:
        `n * n + n * max_len`, and `max_len * max_len` for each span chosen.
    """
    shortest = integer(min_len, "min_len", 1)
    longest = integer(max_len, "max_len", shortest)
    limit = real(iou, "iou")
    if not 0 <= limit < 1:
        raise ValueError(f"iou: got {iou}, expected 0 to below 1")
    scores = triangle_scores(attn, max_len=longest, theta=theta)
    scores[:, : shortest - 1] = -np.inf
    scores[~(scores > 0)] = -np.inf
    n = len(scores)
    if n == 0:
        return np.zeros((0, 2), np.int64)
    owner = np.full(n, -1)
    best, sizes, chosen = scores.max(axis=1), np.arange(1, longest + 1), 0
    while best.max() > -np.inf:
        first = int(best.argmax())
        size = int(scores[first].argmax()) + 1
        mine = owner[first : first + size]
        mine[mine < 0] = chosen
        chosen += 1
        others = np.arange(max(0, first - longest + 1), min(first + size, n))
        common = np.minimum(others[:, None] + sizes, first + size) - np.maximum(others, first)[:, None]
        common = np.maximum(common, 0)
        scores[others] = np.where(common > limit * (size + sizes - common), -np.inf, scores[others])
        best[others] = scores[others].max(axis=1)
    edges = np.flatnonzero(np.diff(owner)) + 1
    return np.stack([np.concatenate([[0], edges]), np.concatenate([edges, [n]])], axis=1).astype(np.int64)


def span_representatives(attn: Array, spans: Array, *, n_rep: int = 4) -> NDArray[np.int64]:
    """The tokens of each span that its own tokens attend to most.

    The paper's rule for its dynamic vectors is not known to us; these are fixed.

    Args:
        attn: causal attention of a segment to itself, floating `[n, n]`.
        spans: integers `[m, 2]` that tile the segment.
        n_rep: tokens per span.

    Returns:
        int64 `[m, n_rep]`, by the sum of `attn` over the span's rows, the earlier of equals first; spans with fewer
        tokens repeat their first choice.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or numbers that do not fit.

    Cost:
        The sum of the spans' squares.
    """
    a, _ = _map(attn, 0.0)
    bounds, count = checked_spans(spans, len(a)), integer(n_rep, "n_rep", 1)
    rows = np.empty((len(bounds), count), np.int64)
    for n, (start, stop) in enumerate(bounds):
        mass = np.tril(a[start:stop, start:stop]).sum(axis=0)
        order = start + np.argsort(-mass, kind="stable")[:count]
        rows[n, : len(order)], rows[n, len(order) :] = order, order[0]
    return rows


def checked_spans(spans: Array, rows: int) -> NDArray[np.int64]:
    """Spans that tile a part of the first `rows` rows, from row 0 on."""
    x = as_numpy(spans, "spans")
    if x.dtype.kind not in "iu":
        raise TypeError(f"spans: got dtype {x.dtype}, expected integers")
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"spans: got shape {x.shape}, expected [m, 2]")
    bounds = x.astype(np.int64)
    if len(bounds):
        tiles = bounds[0, 0] == 0 and bounds[-1, 1] <= rows and (bounds[:, 1] > bounds[:, 0]).all()
        if not tiles or (bounds[1:, 0] != bounds[:-1, 1]).any():
            raise ValueError(f"spans: got spans that do not tile a part of the first {rows} rows, expected such")
    return bounds


def _map(attn: Array, theta: float | None) -> tuple[NDArray[np.float64], float]:
    a = as_numpy(attn, "attn")
    check_floating(a, "attn")
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"attn: got shape {a.shape}, expected [n, n]")
    low = 1 / max(len(a), 1) if theta is None else real(theta, "theta")
    if not np.isfinite(low):
        raise ValueError(f"theta: got {theta}, expected a finite number")
    wide = a.astype(np.float64)
    if not np.isfinite(np.tril(wide)).all():
        raise ValueError("attn: got NaN or infinity, expected finite weights")
    return wide, low
