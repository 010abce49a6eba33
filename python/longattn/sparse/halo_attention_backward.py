"""Gradients of halo attention, from what a forward call saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like, reshaped
from longattn.sparse._grid import Saved, attend_backward, grid_options, saved_forward
from longattn.sparse._halo import Halo, halo_inputs


class HaloGradients(NamedTuple):
    """Gradients of `halo_attention`.

    Attributes:
        dq: as `q`.
        dk: as `k`.
        dv: as `v`.
        d_relative: float32, as `relative`; `None` without it.
    """

    dq: Array
    dk: Array
    dv: Array
    d_relative: tuple[Array, ...] | None


def halo_attention_backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    block: int | Sequence[int] = 8,
    halo: int | Sequence[int] = 3,
    relative: Sequence[Array] | None = None,
    scale_rel: bool = False,
    mask_pad: bool = True,
    stride: int | Sequence[int] = 1,
    scale: float | None = None,
    d_lse: Array | None = None,
) -> HaloGradients:
    """Gradients of `longattn.sparse.halo_attention` by queries, keys, values and relative vectors.

    Those of `longattn.dense.attention_backward` over the keys that each query sees. The relative part of a logit is
    the product of the query's numbers by distance and of the key's place in its region, a vector with a single 1 for
    each axis; so it is differentiated as further dimensions of queries and keys. A query that `stride` leaves out has
    a gradient of 0.

    Args:
        d_out: gradient of the output, shape and dtype of `out`.
        q: queries `[B, Hq, X1.., D]`, as in the forward call.
        k: keys `[B, Hkv, X1.., D]`.
        v: values `[B, Hkv, X1.., Dv]`.
        out: the forward call's output, `[B, Hq, ceil(X1 / stride).., Dv]`.
        lse: the forward call's log-sum-exp, floating `[B, Hq, ceil(X1 / stride)..]`.
        block: as in the forward call; so are the other options.
        halo: as in the forward call.
        relative: as in the forward call.
        scale_rel: as in the forward call.
        mask_pad: as in the forward call.
        stride: as in the forward call.
        scale: as in the forward call.
        d_lse: gradient of the log-sum-exp, floating, shaped as `lse`; `None` is zero.

    Returns:
        The gradients, in the kinds and dtypes of what they are of, those of the relative vectors float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Five matrix products over the regions where the forward call has two. With `relative`, `D` counts
        `sum(block + 2 * halo)` more, and there are float32 copies of the queries and both outputs, and one of the
        keys. Beside the results at most 32 heads' gradients of keys and values in float32, or all of them where there
        are more heads.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 16, 16, 8), dtype=np.float32)
        >>> out, lse = la.sparse.halo_attention(q, k, v, return_lse=True)
        >>> found = la.sparse.halo_attention_backward(np.ones_like(out), q, k, v, out, lse)
        >>> bool(np.allclose(found.dv.sum(axis=(2, 3)), 256, rtol=1e-5))  # each query's weights sum to 1
        True
    """
    x = halo_inputs(
        q, k, v, block=block, halo=halo, relative=relative, scale_rel=scale_rel, mask_pad=mask_pad, stride=stride,
        scale=scale,
    )  # fmt: skip
    saved, given = saved_forward(d_out, out, lse, d_lse, (*x.shape, x.v.shape[-1]), x.q.dtype), x.q.shape
    x = x.laid_out()
    if x.tables is None:
        options, d_tables = grid_options(x.q.shape, x.scale, 0.0, None), None
        dq, dk, dv = attend_backward(saved, x.q, x.k, x.v, x.axes, options)
    else:
        dq, dk, dv, d_tables = _with_tables(x, x.tables, saved)
    of_q = dq
    if x.q.shape != given:
        of_q = np.zeros(given, x.q.dtype)
        of_q[x.every] = dq
    of_k, of_v = (np.ascontiguousarray(d[x.inside]) for d in (dk, dv))
    d_relative = None
    if relative is not None and d_tables is not None:
        d_relative = tuple(like(table, d_table) for table, d_table in zip(relative, d_tables, strict=True))
    return HaloGradients(like(q, of_q), like(k, of_k), like(v, of_v), d_relative)


@dataclass(frozen=True, slots=True)
class _Part:
    """The relative part of one axis as further dimensions, one for each place of a region.

    Places are keys modulo the region's size, by which no two keys of a region are the same.

    Attributes:
        numbers: those of each query by distance, `[B, Hq, Y1.., entries]`.
        entry: the entry that each place is to the queries of this axis, `[1, 1, .. Y .., places]`.
        seen: whether they see it, likewise.
        of_keys: 1 at the place of each key of this axis, else 0, `[1, 1, .. X .., places]`.
    """

    numbers: NDArray[np.float32]
    entry: NDArray[np.int64]
    seen: NDArray[np.bool_]
    of_keys: NDArray[np.bool_]

    def of_queries(self) -> NDArray[np.float32]:
        """The numbers by place, 0 where a query does not see it, `[B, Hq, Y1.., places]`."""
        return np.where(self.seen, np.take_along_axis(self.numbers, self.entry, axis=-1), np.float32(0))

    def by_distance(self, of_places: NDArray[np.float32]) -> NDArray[np.float32]:
        """Gradients by place as those of `numbers`."""
        found = np.zeros_like(self.numbers)
        np.put_along_axis(found, self.entry, np.where(self.seen, of_places, np.float32(0)), axis=-1)
        return found


def _parts(x: Halo) -> list[_Part]:
    """The relative part of each axis."""
    found = []
    for a, (numbers, axis, first, side) in enumerate(zip(x.by_axis(), x.axes, x.first, x.sides, strict=True)):
        places = np.arange(min(side, axis.keys))
        along = [1] * (len(x.axes) + 3)
        along[a + 2], along[-1] = -1, len(places)
        _, start, end, position = (column[:, None] for column in axis.intervals.astype(np.int64).T)
        keys = first[:, None] + (places - first[:, None]) % side
        entry, seen = keys - position + numbers.shape[-1] // 2, (keys >= start) & (keys < end)
        of_keys = np.arange(axis.keys)[:, None] % side == places
        found.append(_Part(numbers, *(reshaped(y, *along) for y in (entry, seen, of_keys))))
    return found


@np.errstate(over="ignore", invalid="ignore")  # infinite numbers, of which the kernels do not warn either
def _with_tables(
    x: Halo, tables: Sequence[NDArray[np.float32]], saved: Saved
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], list[NDArray[np.float32]]]:
    """Gradients of queries, keys, values and tables, where there are tables."""
    parts, dim, factor = _parts(x), x.q.shape[-1], np.float32(x.scale)
    ones = (np.broadcast_to(part.of_keys, (*x.k.shape[:-1], part.of_keys.shape[-1])) for part in parts)
    wide_q = np.concatenate([factor * x.q.astype(np.float32), *(part.of_queries() for part in parts)], axis=-1)
    wide_k = np.concatenate([x.k, *(part.astype(x.k.dtype) for part in ones)], axis=-1)
    d_out, out, lse, d_lse = saved
    wide = d_out.astype(np.float32, copy=False), out.astype(np.float32, copy=False), lse, d_lse
    dq, dk, dv = attend_backward(wide, wide_q, wide_k, x.v, x.axes, grid_options(wide_q.shape, 1.0, 0.0, None))
    of_q, *of_parts = np.split(dq, np.cumsum([dim, *(part.of_keys.shape[-1] for part in parts)])[:-1], axis=-1)
    of_q, rows, d_tables = factor * of_q, x.rows(), []
    for part, of_part, table in zip(parts, of_parts, tables, strict=True):
        of_rows = np.float32(x.relative_scale) * part.by_distance(of_part).reshape(-1, len(table))
        of_q += (of_rows @ table).reshape(of_q.shape)
        d_tables.append(np.matmul(of_rows.T, rows, dtype=np.float32))
    return of_q.astype(x.q.dtype, copy=False), dk[..., :dim], dv, d_tables
