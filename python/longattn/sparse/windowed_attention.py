"""Exact attention to a range of keys around a place that each query has of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import batched, dense_inputs, flag, integer, returned
from longattn.dense._options import score_options


def windowed_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    radius: int | tuple[int, int] | Array,
    centre: Array | None = None,
    causal: bool = False,
    scale: float | Array | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention of each query to the keys around its centre, in windows that may differ by head and query.

    Query `i` of head `h` sees the keys from `centre[i] - left[h]` to `centre[i] + right[h]`, as far as they exist. One
    radius for all heads and centres at the queries' own positions is `longattn.attention` with a `window`. A query
    without keys gives zeros and an lse of -inf.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        radius: keys seen on both sides of the centre: a number, a pair `(left, right)`, or integers `[Hq]` or
            `[Hq, 2]` by query head; not negative.
        centre: integers `[Lq]`, `[Hq, Lq]` or `[B, Hq, Lq]`, which may lie outside the keys; `None` is each query's own
            position, the last query being at the last key.
        causal: a query sees no key behind its own position.
        scale: as in `longattn.attention`.
        softcap: as in `longattn.attention`.
        sinks: as in `longattn.attention`.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`. With `return_lse`, the pair with
        the lse, float32 without the last axis.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a negative radius.

    Cost:
        Linear in queries times window where neighbouring queries look at neighbouring places: queries go through the
        matrix kernel together, with all keys between the first and the last that any of them sees. Heads of one KV head
        whose windows differ read keys one after another.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 16), dtype=np.float32)
        >>> out = la.sparse.windowed_attention(q, k, v, radius=np.array([4, 16]))
        >>> np.allclose(out[:1], la.attention(q[:1], k[:1], v[:1], window=(4, 4)), atol=1e-5)
        True
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    *outer, heads, rows, _ = qn.shape
    batch, keys = (outer[0] if outer else 1), kn.shape[-2]
    sides = _sides(radius, heads)
    causal, return_lse = flag(causal, "causal"), flag(return_lse, "return_lse")
    options = score_options(qn.shape, keys, span=rows + keys, scale=scale, softcap=softcap, sinks=sinks)
    result, lse = np.empty((*qn.shape[:-1], vn.shape[-1]), qn.dtype), np.empty(qn.shape[:-1], np.float32)
    position = np.arange(keys - rows, keys)
    centres = position if centre is None else _centres(centre, batch, heads, rows)
    if lse.size:
        ranges: dict[bytes, tuple[int, NDArray[np.uint32]]] = {}
        of_heads = []
        for b, h in np.ndindex(batch, heads):
            own = centres[(b, h)[3 - centres.ndim :]] if centres.ndim > 1 else centres
            table = _ranges(own, sides[h], position if causal else None, keys)
            of_heads.append(ranges.setdefault(table.tobytes(), (len(ranges), table))[0])
        q4, k4, v4, out4 = (batched(x, 4) for x in (qn, kn, vn, result))
        numbers = np.array(of_heads, np.uint32)
        _core.windowed(q4, k4, v4, out4, batched(lse, 3), [table for _, table in ranges.values()], numbers, options)
    return returned(None, q, result, lse if return_lse else None)


def _sides(radius: object, heads: int) -> NDArray[np.int64]:
    """Keys to the left and to the right, `[Hq, 2]`."""
    if isinstance(radius, tuple) and len(radius) == 2:
        return np.tile([integer(side, "radius", 0) for side in radius], (heads, 1))
    if not hasattr(radius, "shape"):
        return np.full((heads, 2), integer(radius, "radius", 0))
    x = as_numpy(radius, "radius", any_strides=True)
    if x.dtype.kind not in "iu":
        raise TypeError(f"radius: got dtype {x.dtype}, expected integers")
    if x.shape not in ((heads,), (heads, 2)):
        raise ValueError(f"radius: got shape {x.shape}, expected {(heads,)} or {(heads, 2)}")
    if x.size and x.min() < 0:
        raise ValueError(f"radius: got {x.min()}, expected numbers of at least 0")
    return np.broadcast_to(x.reshape(heads, -1), (heads, 2)).astype(np.int64)


def _centres(centre: Array, batch: int, heads: int, rows: int) -> NDArray[np.int64]:
    x = as_numpy(centre, "centre", any_strides=True)
    if x.dtype.kind not in "iu":
        raise TypeError(f"centre: got dtype {x.dtype}, expected integers")
    shapes = (rows,), (heads, rows), (batch, heads, rows)
    if x.shape not in shapes:
        raise ValueError(f"centre: got shape {x.shape}, expected {shapes[0]}, {shapes[1]} or {shapes[2]}")
    return x.astype(np.int64)


def _ranges(
    centres: NDArray[np.int64], sides: NDArray[np.int64], position: NDArray[np.int64] | None, keys: int
) -> NDArray[np.uint32]:
    """`[0, start, end, 0]` of each query."""
    start, end = np.clip(centres - sides[0], 0, keys), np.clip(centres + sides[1] + 1, 0, keys)
    if position is not None:
        end = np.clip(end, 0, np.maximum(position + 1, 0))
    table = np.zeros((len(centres), 4), np.uint32)
    table[:, 1], table[:, 2] = start, np.maximum(start, end)
    return table
