"""Sums over softmax weights that are never stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import batched, check_floating, flag, integer
from longattn.dense._query_key import query_key_inputs, row_values, weight_options

#: The highest power of the distance that is averaged.
MAX_MOMENTS = 4


@dataclass(frozen=True, slots=True)
class ProbReductions:
    """What `prob_reduce` computed, in the kind of `q`; `None` where it was not asked for.

    Attributes:
        lse: float32 `[B, Hq, Lq]`: log-sum-exp of each row's logits, the sink included; the one that was given,
            if one was.
        column_mass: float32 `[B, Hq, Lk]`: `sum_i w_i P_ij`.
        column_max: float32 `[B, Hq, Lk]`: `max_i P_ij`, 0 where no row sees the key.
        segment_mass: float32 `[B, Hq, Lq, S]`: `sum of P_ij over the keys j of segment s`.
        entropy: float32 `[B, Hq, Lq]`: `-sum_j P_ij ln P_ij` in nats, over keys (the sink's share is none).
        distance_moments: float32 `[B, Hq, Lq, M]`: entry `m - 1` is `sum_j d_ij^m P_ij`.
        row_max: float32 `[B, Hq, Lq]`: `max_j P_ij`, 0 in a row that sees no key.
        row_max_key: int64 `[B, Hq, Lq]`: the key of the row's largest logit, the lowest of equal ones; -1 in a
            row that sees no key.
    """

    lse: Array
    column_mass: Array | None = None
    column_max: Array | None = None
    segment_mass: Array | None = None
    entropy: Array | None = None
    distance_moments: Array | None = None
    row_max: Array | None = None
    row_max_key: Array | None = None


def prob_reduce(
    q: Array,
    k: Array,
    *,
    column_mass: bool = False,
    query_weights: Array | None = None,
    column_max: bool = False,
    segment_ids: Array | None = None,
    segment_count: int | None = None,
    entropy: bool = False,
    distance_moments: int = 0,
    distance_limit: int | None = None,
    row_max: bool = False,
    lse: Array | None = None,
    **options: Any,
) -> ProbReductions:
    """Sums, moments and maxima of the weights `P = exp(logits - lse)` of `attention`, without storing them.

    A pass over queries and keys computes the weights again, block by block, and keeps only what was asked for;
    everything asked for in one call comes from one pass. Query heads are kept apart. Sums are float32 over
    256 keys of a row and 8 rows of a column, float64 beyond, so that their error does not grow with length.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]` (then no result has a batch axis); float32, float16 or
            bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes, or the `keys` of a `KVStore` of codes.
        column_mass: how much weight each key receives, summed over query rows.
        query_weights: floating `[Lq]` or `[B, Hq, Lq]` (`[Hq, Lq]` without a batch axis), of either sign:
            factors `w_i` of the rows in `column_mass`; `None` is 1.
        column_max: the largest weight that each key receives.
        segment_ids: integers `[Lk]` or `[B, Lk]`, the segment of each key, negative for none; asks for
            `segment_mass`.
        segment_count: number of segments `S`; `None` is the largest id plus 1.
        entropy: the entropy of each row.
        distance_moments: how many moments `M` of the distance `d_ij = position of row i - j`, 0 to 4. Rows sit
            at positions `Lk - Lq + i`; keys after a row have negative distances.
        distance_limit: distances are clipped to `-limit` to `limit`; `None` does not clip.
        row_max: the largest weight of each row, and its key.
        lse: floating `[B, Hq, Lq]` (or `[Hq, Lq]`), natural logarithm: the log of each row's denominator, as
            `attention(..., return_lse=True)` gives it; saves the pass that computes it. That of more keys than
            these, or with another window, makes the weights shares of that larger softmax; it should not be
            far below the log-sum-exp of these keys. Rows of -inf count as seeing no key.
        options: those of `longattn.attention` that say what the weights are: causal, window, scale, softcap, bias,
            mask, alibi_slopes, sinks, relative_bias, relative_zero, segments, visible_until. With sinks rows sum to
            less than 1.

    Returns:
        The arrays that were asked for. Rows that see no key contribute nothing. NaN in visible logits makes
        the row's own results NaN, and the column results of all keys that the row sees.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or nothing asked for.

    Cost:
        `Hq * Lq * visible keys * D` multiply-adds, twice that without `lse`. Memory: the results, 8 bytes per
        entry of `column_mass`, and partial sums of 192 query rows.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k = np.random.default_rng(0).standard_normal((2, 4, 100, 16), dtype=np.float32)
        >>> r = la.dense.prob_reduce(q, k, column_mass=True, entropy=True, causal=True)
        >>> r.column_mass.shape, r.entropy.shape, bool(abs(r.column_mass.sum() - 400) < 1e-3)
        ((4, 100), (4, 100), True)
    """
    qn, kn = query_key_inputs(q, k)
    checked = weight_options(qn, kn, options)
    heads, rows, keys = qn.shape[:-2], qn.shape[-2], kn.shape[-2]
    wanted: dict[str, Any] = {}
    given: dict[str, Any] = {}
    if flag(column_mass, "column_mass"):
        wanted["column_mass"] = np.empty((*heads, keys), np.float32)
        if query_weights is not None:
            given["query_weights"] = batched(_row_factors(query_weights, qn.shape[:-1]), 3)
    elif query_weights is not None:
        raise ValueError("query_weights: got weights without column_mass=True, expected None")
    if flag(column_max, "column_max"):
        wanted["column_max"] = np.empty((*heads, keys), np.float32)
    if segment_ids is not None:
        ids, count = _segments(segment_ids, segment_count, 1 if qn.ndim == 3 else qn.shape[0], keys)
        given["segment_ids"] = ids
        wanted["segment_mass"] = np.empty((*heads, rows, count), np.float32)
    elif segment_count is not None:
        raise ValueError(f"segment_count: got {segment_count!r} without segment_ids, expected None")
    if flag(entropy, "entropy"):
        wanted["entropy"] = np.empty((*heads, rows), np.float32)
    moments = integer(distance_moments, "distance_moments", 0, MAX_MOMENTS)
    if moments:
        wanted["distance_moments"] = np.empty((*heads, rows, moments), np.float32)
        if distance_limit is not None:
            given["distance_limit"] = float(integer(distance_limit, "distance_limit", 0, 2**32))
    elif distance_limit is not None:
        raise ValueError(f"distance_limit: got {distance_limit!r} without distance_moments, expected None")
    if flag(row_max, "row_max"):
        wanted["row_max"] = np.empty((*heads, rows), np.float32)
        wanted["row_max_key"] = np.empty((*heads, rows), np.int64)
    if not wanted:
        raise ValueError(
            "prob_reduce: got nothing to compute, expected at least one of column_mass, column_max, segment_ids, "
            "entropy, distance_moments and row_max"
        )
    if lse is None:
        lse_n = np.empty((*heads, rows), np.float32)
        wanted["lse"] = lse_n
    else:
        lse_n = row_values(lse, "lse", (*heads, rows))
        given["given_lse"] = batched(lse_n, 3)

    ranks = {"segment_mass": 4, "distance_moments": 4}
    arrays: dict[str, Any] = {name: batched(x, ranks.get(name, 3)) for name, x in wanted.items()}
    _core.prob_reduce(batched(qn, 4), batched(kn, 4), checked, **given, **arrays)
    return ProbReductions(**{name: like(q, x) for name, x in (wanted | {"lse": lse_n}).items()})


def _row_factors(query_weights: Array, rows: tuple[int, ...]) -> NDArray[np.float32]:
    """Factors of query rows as contiguous float32 of the shape `rows`."""
    x = as_numpy(query_weights, "query_weights")
    check_floating(x, "query_weights")
    if x.shape not in (rows[-1:], rows):
        raise ValueError(f"query_weights: got shape {x.shape}, expected {rows[-1:]} or {rows}")
    return np.ascontiguousarray(np.broadcast_to(x, rows), np.float32)


def _segments(segment_ids: Array, segment_count: object, batch: int, keys: int) -> tuple[NDArray[np.int32], int]:
    """Ids as contiguous `[1, Lk]` or `[B, Lk]`, -1 for none, and their number."""
    x = as_numpy(segment_ids, "segment_ids")
    if x.dtype.kind not in "iu":
        raise TypeError(f"segment_ids: got dtype {x.dtype}, expected integers")
    if x.shape not in ((keys,), (batch, keys)):
        raise ValueError(f"segment_ids: got shape {x.shape}, expected {(keys,)} or {(batch, keys)}")
    largest = int(x.max(initial=-1)) if x.dtype.kind == "i" else int(x.max(initial=0)) if x.size else -1
    most = 2**31 - 1
    count = largest + 1 if segment_count is None else integer(segment_count, "segment_count", 0, most)
    if largest >= min(count, most):
        raise ValueError(f"segment_ids: got {largest}, expected ids below {min(count, most)}")
    return np.ascontiguousarray(batched(np.maximum(x, -1) if x.dtype.kind == "i" else x, 2), np.int32), count
