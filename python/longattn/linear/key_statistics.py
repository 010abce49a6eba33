"""Attention over all keys at once, from three sums over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, reshaped
from longattn._checks import attention_inputs, batched, check_heads, finite, one_of, per_head, result_array, returned
from longattn.linear.feature_map import FeatureMap, feature_map, parts

#: What `read_statistics` may make of the sums.
READ_OUTS = ("plain", "plain_means", "divide", "divide_means", "clamp", "subtract", "magnitude")

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class KeyStatistics:
    """Sums over the keys of each head: all that linear attention needs of them, whatever their number.

    Attributes:
        sums: float32 `[B, H, F, Dv]`: `S = sum phi(k_j) v_j^T`.
        totals: float32 `[B, H, F]`: `z = sum phi(k_j)`.
        values: float32 `[B, H, Dv]`: `u = sum v_j`.
        counts: float32 `[B]`: the keys that counted.
        phi: the map of the keys.
    """

    sums: Float32
    totals: Float32
    values: Float32
    counts: Float32
    phi: FeatureMap


def key_statistics(
    k: Array, v: Array, *, phi: str | FeatureMap = "identity", mask: Array | None = None
) -> KeyStatistics:
    """The sums over keys and values that `read_statistics` reads, in one blocked pass.

    Args:
        k: keys `[B, H, L, D]`, or `[H, L, D]`; float32, float16 or bfloat16.
        v: values `[B, H, L, Dv]`, or `[H, L, Dv]`; dtype of `k`.
        phi: the map of the keys, or its name.
        mask: boolean `[L]` or `[B, L]`; True lets the key count. `None` is all.

    Returns:
        The sums.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `H * L * F * Dv` multiply-adds; every key and value is read once.

    Example:
        >>> import numpy as np, longattn as la
        >>> k, v = np.random.default_rng(0).standard_normal((2, 4, 100, 16), dtype=np.float32)
        >>> la.linear.key_statistics(k, v, phi="relu").sums.shape
        (1, 4, 16, 16)
    """
    chosen = feature_map(phi)
    kn, _, vn = attention_inputs(k, k, v, ranks=(3, 4))
    if vn.shape[:-1] != kn.shape[:-1]:
        raise ValueError(f"v: got shape {vn.shape}, expected {kn.shape[:-1]} and a head_dim, as in k")
    k4, v4 = batched(kn, 4), batched(vn, 4)
    given = parts(chosen, k4.shape[1], k4.shape[3], keys=True)
    sums, totals, values, counts = accumulate(k4, v4, given, key_mask(mask, k4.shape[0], k4.shape[2]))
    return KeyStatistics(sums, totals, values, counts, chosen)


def read_statistics(
    q: Array,
    statistics: KeyStatistics,
    *,
    phi: str | FeatureMap | None = None,
    read_out: str = "divide",
    eps: float = 0.0,
    scale: float = 1.0,
    factors: Array | None = None,
    out: Array | None = None,
) -> Any:
    """Attention of queries to sums over keys.

    With `p = phi(q)^T S`, `t = phi(q)^T z`, `n` keys and `m = scale t / n`:

    - "plain": `scale p`; "plain_means": `scale p / n`
    - "divide": `p / (t + eps)`; "divide_means": `(p / n) / (t / n + eps)`
    - "clamp": `factors_h p / max(t, eps)`
    - "subtract": `scale p / n + (1 - m) u / n`
    - "magnitude": `(1 + 1 / (m + eps)) scale p / n - m u / n`

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        statistics: what `key_statistics` gave, its heads a divisor of `Hq`.
        phi: the map of the queries, or its name; `None` is that of the keys.
        read_out: one of the formulas above.
        eps: as in the formulas.
        scale: as in the formulas.
        factors: floating `[Hq]`, of "clamp"; `None` is 1.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) in the kind and dtype of `q`; zeros where no key counted or
        where a denominator is 0.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * Lq * F * Dv` multiply-adds.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 100, 16), dtype=np.float32)
        >>> la.linear.read_statistics(q, la.linear.key_statistics(k, v, phi="elu1")).shape
        (4, 100, 16)
    """
    if not isinstance(statistics, KeyStatistics):
        raise TypeError(f"statistics: got {type(statistics).__name__}, expected KeyStatistics")
    chosen = statistics.phi if phi is None else feature_map(phi)
    one_of(read_out, "read_out", READ_OUTS)
    qn, _, _ = attention_inputs(q, q, q, ranks=(3, 4))
    q4 = batched(qn, 4)
    batch, kv_heads, features, value_dim = statistics.sums.shape
    if q4.shape[0] != batch:
        raise ValueError(f"q: got batch {q4.shape[0]}, expected {batch} as in statistics")
    check_heads(q4.shape[1], kv_heads, kv_heads)
    if chosen.features(q4.shape[3]) != features:
        raise ValueError(f"q: got {chosen.features(q4.shape[3])} features, expected {features} as in statistics")
    per_query_head = np.ones(q4.shape[1], np.float32) if factors is None else per_head(factors, "factors", q4.shape[1])
    eps, scale = finite(eps, "eps", 0), finite(scale, "scale")
    result = result_array(out, q, (*qn.shape[:-1], value_dim), qn.dtype, {"q": qn})
    sums = (statistics.sums, statistics.totals, statistics.values, statistics.counts)
    first = eps if read_out in ("divide", "divide_means", "clamp") else scale
    given = parts(chosen, q4.shape[1], q4.shape[3], keys=False)
    read(q4, given, sums, (read_out, first, eps), batched(result, 4), factors=per_query_head)
    return returned(out, q, result, None)


def key_mask(mask: Array | None, batch: int, keys: int, name: str = "mask") -> NDArray[np.bool_] | None:
    """Keys that count, as contiguous `[B, L]`."""
    if mask is None:
        return None
    x = as_numpy(mask, name, any_strides=True)
    if x.dtype != np.bool_:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected bool")
    if x.shape not in ((keys,), (batch, keys)):
        raise ValueError(f"{name}: got shape {x.shape}, expected {(keys,)} or {(batch, keys)}")
    return np.ascontiguousarray(np.broadcast_to(x, (batch, keys)))


def accumulate(
    k: NDArray[Any], v: NDArray[Any], given: Mapping[str, Any], keep: NDArray[np.bool_] | None
) -> tuple[Float32, Float32, Float32, Float32]:
    """The sums over checked keys and values of rank 4."""
    batch, heads, _, _ = k.shape
    sums, totals, values, counts = _core.key_statistics(k, v, dict(given), keep)
    width = v.shape[3]
    return (
        reshaped(sums, batch, heads, -1, width),
        reshaped(totals, batch, heads, -1),
        values.reshape(batch, heads, width),
        counts,
    )


def read(
    q: NDArray[Any],
    given: Mapping[str, Any],
    sums: tuple[Float32, Float32, Float32, Float32],
    read_out: tuple[str, float, float],
    out: NDArray[Any],
    *,
    factors: Float32 | None = None,
    add: NDArray[Any] | None = None,
) -> None:
    """Reads sums with checked queries of rank 4 into `out`, adding `add`."""
    flat = [np.ascontiguousarray(x).reshape(-1) for x in sums]
    _core.read_statistics(q, dict(given), flat, sums[0].shape[1], read_out, factors, add, out)
