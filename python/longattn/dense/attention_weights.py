"""Softmax weights of chosen query rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import batched
from longattn.dense._query_key import query_key_inputs, row_values, weight_options


def attention_weights(q: Array, k: Array, rows: Array, *, lse: Array | None = None, **options: Any) -> Array:
    """Weights that `attention` gives the keys in some of its query rows, `exp(logits - lse)`.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16. All of them, not the chosen
            ones only: a row's place says its position.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes, or the `keys` of a `KVStore` of codes.
        rows: which query rows, integers `[n]` (an array, or a sequence of ints), in any order, repeated or not;
            negative ones count from the end.
        lse: floating `[B, Hq, n]` (or `[Hq, n]`): the log of each chosen row's denominator, natural logarithm.
            Weights are then `exp(logits - lse)`, as is right for keys that are a part of all keys; it should
            not be far below the log-sum-exp of these. `None`: of these keys and the sink, computed here.
        options: those of `longattn.attention` that say what the weights are: causal, window, scale, softcap, bias,
            mask, alibi_slopes, sinks, relative_bias, relative_zero, segments, visible_until. What has an axis
            `Lq` counts all query rows.

    Returns:
        Weights `[B, Hq, n, Lk]` (or `[Hq, n, Lk]`), float32, in the kind of `q`. Rows sum to 1, less what the
        sink takes (or as `lse` has it); what a row does not see weighs 0, and so do all keys of a row that
        sees none. NaN in visible logits makes the row's visible weights NaN.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes, rows or values that do not fit.

    Cost:
        `Hq * n * visible keys * D` multiply-adds, each key read once per 192 rows of a query group. Memory:
        the result, a few hundred KiB of scratch per thread.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k = np.random.default_rng(0).standard_normal((2, 4, 100, 16), dtype=np.float32)
        >>> w = la.dense.attention_weights(q, k, [-1], causal=True)
        >>> w.shape, bool(abs(w.sum() - 4) < 1e-5)
        ((4, 1, 100), True)
    """
    qn, kn = query_key_inputs(q, k)
    chosen = row_numbers(rows, qn.shape[-2])
    checked = weight_options(qn, kn, options)
    shape = (*qn.shape[:-2], len(chosen))
    lse_n = None if lse is None else batched(row_values(lse, "lse", shape), 3)
    result = np.zeros((*shape, kn.shape[-2]), np.float32)
    if result.size:
        _core.attention_weights(batched(qn, 4), batched(kn, 4), chosen, lse_n, batched(result, 4), checked)
    return like(q, result)


def row_numbers(rows: Any, length: int) -> list[int]:
    """Numbers of rows, none negative."""
    x: NDArray[Any] = np.asarray(rows) if isinstance(rows, list | tuple | range) else as_numpy(rows, "rows")
    if x.size == 0:
        x = x.astype(np.int64)
    if x.dtype.kind not in "iu":
        raise TypeError(f"rows: got dtype {x.dtype}, expected integers")
    if x.ndim != 1:
        raise ValueError(f"rows: got shape {x.shape}, expected [n]")
    numbers: list[int] = x.tolist()
    for number in numbers:
        if not -length <= number < length:
            raise ValueError(f"rows: got {number}, expected numbers from {-length} to {length - 1}")
    return [number % length for number in numbers]
