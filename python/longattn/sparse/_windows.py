"""Ranges of keys around a place of each query: what `windowed_attention` and its gradients read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import flag, integer
from longattn.sparse._lengths import packed_bounds

#: Tables `[0, start, end, 0]` of each query, and which of them each batch entry and head has.
Ranges = tuple[list[NDArray[np.uint32]], NDArray[np.uint32]]

#: Farther than any key; larger numbers count as this, so that sums of them do not wrap around.
_FAR = 2**61


def window_ranges(
    q: tuple[int, ...],
    keys: int,
    radius: object,
    centre: Array | None,
    causal: object,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
) -> Ranges:
    """The checked arguments of `windowed_attention` as ranges, for queries of shape `q`."""
    *outer, heads, rows, _ = q
    batch = outer[0] if outer else 1
    sides = _sides(radius, heads)
    hidden = flag(causal, "causal")
    first, last, position = _sequences(batch, rows, keys, cu_seqlens_q, cu_seqlens_k)
    centres = position if centre is None else _centres(centre, batch, heads, rows) + first
    ends = np.minimum(last, np.maximum(position + 1, first)) if hidden else last
    found: dict[bytes, tuple[int, NDArray[np.uint32]]] = {}
    of_heads = []
    for b, h in np.ndindex(batch, heads):
        own = centres[(b, h)[3 - centres.ndim :]] if centres.ndim > 1 else centres
        table = np.zeros((rows, 4), np.uint32)
        table[:, 1] = np.clip(own - sides[h, 0], first, ends)
        table[:, 2] = np.clip(own + sides[h, 1] + 1, table[:, 1], ends)
        of_heads.append(found.setdefault(table.tobytes(), (len(found), table))[0])
    return [table for _, table in found.values()], np.array(of_heads, np.uint32)


def ranges_mask(ranges: Ranges, shape: tuple[int, ...], keys: int) -> NDArray[np.bool_]:
    """What queries of `shape` `[.., D]` see, `[.., Lk]`."""
    tables, of_heads = ranges
    key = np.arange(keys)
    seen = np.array([(key >= table[:, 1:2]) & (key < table[:, 2:3]) for table in tables], bool)
    return seen[of_heads].reshape(*shape[:-1], keys)


def _sequences(
    batch: int, rows: int, keys: int, cu_seqlens_q: Array | None, cu_seqlens_k: Array | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """First key of each query's sequence, the one after its last, and the query's own position among all keys."""
    bounds = packed_bounds(batch, rows, keys, cu_seqlens_q, cu_seqlens_k)
    if bounds is None:
        position = np.arange(keys - rows, keys)
        return np.zeros(rows, np.int64), np.full(rows, keys), position
    bounds_q, bounds_k = bounds
    lengths = np.diff(bounds_q)
    first, last = np.repeat(bounds_k[:-1], lengths), np.repeat(bounds_k[1:], lengths)
    return first, last, np.arange(rows) - np.repeat(bounds_q[1:], lengths) + last


def _sides(radius: object, heads: int) -> NDArray[np.int64]:
    """Keys to the left and to the right, `[Hq, 2]`."""
    if isinstance(radius, tuple) and len(radius) == 2:
        return np.tile([min(integer(side, "radius", 0), _FAR) for side in radius], (heads, 1))
    if not hasattr(radius, "shape"):
        return np.full((heads, 2), min(integer(radius, "radius", 0), _FAR))
    x = as_numpy(radius, "radius", any_strides=True)
    if x.dtype.kind not in "iu":
        raise TypeError(f"radius: got dtype {x.dtype}, expected integers")
    if x.shape not in ((heads,), (heads, 2)):
        raise ValueError(f"radius: got shape {x.shape}, expected {(heads,)} or {(heads, 2)}")
    if x.size and x.min() < 0:
        raise ValueError(f"radius: got {x.min()}, expected numbers of at least 0")
    return np.broadcast_to(_no_farther(x).reshape(heads, -1), (heads, 2))


def _centres(centre: Array, batch: int, heads: int, rows: int) -> NDArray[np.int64]:
    x = as_numpy(centre, "centre", any_strides=True)
    if x.dtype.kind not in "iu":
        raise TypeError(f"centre: got dtype {x.dtype}, expected integers")
    shapes = (rows,), (heads, rows), (batch, heads, rows)
    if x.shape not in shapes:
        raise ValueError(f"centre: got shape {x.shape}, expected {shapes[0]}, {shapes[1]} or {shapes[2]}")
    return _no_farther(x)


def _no_farther(x: NDArray[Any]) -> NDArray[np.int64]:
    signed = np.minimum(x, np.uint64(_FAR)) if x.dtype == np.uint64 else x
    return np.clip(signed.astype(np.int64), -_FAR, _FAR)
