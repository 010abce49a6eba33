"""What halo attention and its gradients are given: checked once, in the form the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, flag, scale_factor
from longattn.sparse._grid import GridAxis, GridBias, grid_inputs, own_grid, per_axis


@dataclass(frozen=True, slots=True)
class Halo:
    """A checked call.

    Attributes:
        q: every `stride`-th query, `[B, Hq, Y1.., D]`.
        k: keys `[B, Hkv, X1.., D]`, with zeros around them where these count.
        v: values, likewise.
        axes: what the queries see of them.
        tables: the relative vectors of each axis, or `None`.
        scale: factor on the dot products.
        relative_scale: factor on the relative part.
        given: shape of the queries that were given.
        every: where those of `q` lie in it.
        inside: where the keys that were given lie in `k`.
        first: for each axis and query the first place of its block's region, inside the grid or not, counted as the
            keys of `axes` are.
        sides: places of a region along each axis.
    """

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    axes: tuple[GridAxis, ...]
    tables: tuple[NDArray[np.float32], ...] | None
    scale: float
    relative_scale: float
    given: tuple[int, ...]
    every: tuple[slice, ...]
    inside: tuple[slice, ...]
    first: tuple[NDArray[np.int64], ...]
    sides: tuple[int, ...]

    def rows(self) -> NDArray[np.float32]:
        """The queries one after another, as factors of the tables, `[B * Hq * Y, D]`."""
        return self.q.reshape(-1, self.q.shape[-1]).astype(np.float32, copy=False)

    def by_axis(self) -> tuple[NDArray[np.float32], ...]:
        """The relative part of each query by distance, per axis `[B, Hq, Y1.., entries]`."""
        rows, factor = self.rows(), np.float32(self.relative_scale)
        shape = self.q.shape[:-1]
        return tuple((rows @ (factor * table.T)).reshape(*shape, len(table)) for table in self.tables or ())

    def bias(self) -> GridBias | None:
        """That for the kernel; `None` without tables."""
        if self.tables is None:
            return None
        entries = tuple(map(len, self.tables))
        return GridBias(entries, tuple(n // 2 for n in entries), by_axis=self.by_axis())


def halo_inputs(
    q: Array,
    k: Array,
    v: Array,
    *,
    block: object,
    halo: object,
    relative: object,
    scale_rel: object,
    mask_pad: object,
    stride: object,
    scale: object,
) -> Halo:
    """The arguments of `halo_attention`, of these names, as a checked call."""
    qn, kn, vn = grid_inputs(q, k, v)
    lengths = own_grid(qn, kn)
    count, dim = len(lengths), qn.shape[-1]
    sizes, rims = per_axis(block, "block", count, 1), per_axis(halo, "halo", count, 0)
    steps = per_axis(stride, "stride", count, 1)
    for size, step in zip(sizes, steps, strict=True):
        if size % step:
            raise ValueError(f"stride: got {step}, expected a divisor of the block {size}")
    with_scale, hides = flag(scale_rel, "scale_rel"), flag(mask_pad, "mask_pad")
    tables = _tables(relative, [2 * (size + rim) - 1 for size, rim in zip(sizes, rims, strict=True)], dim)
    factor = scale_factor(scale, dim)
    rules = list(zip(lengths, sizes, rims, steps, strict=True))
    axes = tuple(_axis(*rule, hides) for rule in rules)
    pads = [0 if hides else rim for rim in rims]
    if not hides:
        sides = [(rim, axis.keys - n - rim) for rim, axis, n in zip(rims, axes, lengths, strict=True)]
        kn, vn = (np.pad(x, ((0, 0), (0, 0), *sides, (0, 0))) for x in (kn, vn))
    every = (slice(None), slice(None), *(slice(None, None, step) for step in steps))
    shape = qn.shape
    if max(steps) > 1:
        qn = np.ascontiguousarray(qn[every])
    return Halo(
        q=qn,
        k=kn,
        v=vn,
        axes=axes,
        tables=tables,
        scale=factor,
        relative_scale=factor if with_scale else 1.0,
        given=shape,
        every=every,
        inside=(slice(None), slice(None), *(slice(pad, pad + n) for pad, n in zip(pads, lengths, strict=True))),
        first=tuple(_first(*rule) + pad for rule, pad in zip(rules, pads, strict=True)),
        sides=tuple(size + 2 * rim for size, rim in zip(sizes, rims, strict=True)),
    )


def table_of_each(relative: object, axes: int) -> tuple[Any, ...] | None:
    """As many tables as there are axes, not looked at."""
    if relative is None:
        return None
    if not isinstance(relative, Sequence):
        raise TypeError(f"relative: got {type(relative).__name__}, expected a sequence of a table for each axis")
    if len(relative) != axes:
        raise ValueError(f"relative: got {len(relative)} tables, expected {axes}, one per axis of the grid")
    return tuple(relative)


def _tables(relative: object, entries: Sequence[int], dim: int) -> tuple[NDArray[np.float32], ...] | None:
    """A checked table for each axis."""
    tables = table_of_each(relative, len(entries))
    if tables is None:
        return None
    found = []
    for a, (table, count) in enumerate(zip(tables, entries, strict=True)):
        x = as_numpy(table, f"relative[{a}]")
        check_floating(x, f"relative[{a}]")
        if x.shape != (count, dim):
            raise ValueError(f"relative[{a}]: got shape {x.shape}, expected {(count, dim)}, 2 (block + halo) - 1 rows")
        found.append(x.astype(np.float32, copy=False))
    return tuple(found)


def _first(length: int, block: int, halo: int, stride: int) -> NDArray[np.int64]:
    """Where the regions of an axis' queries begin."""
    return np.arange(0, length, stride) // block * block - halo


def _axis(length: int, block: int, halo: int, stride: int, hides: bool) -> GridAxis:
    """Every `stride`-th query sees its block and `halo` keys on both sides, of the axis or of the padded one."""
    position, start = np.arange(0, length, stride), _first(length, block, halo, stride)
    end, keys = start + block + 2 * halo, length
    if hides:
        start, end = np.maximum(start, 0), np.minimum(end, length)
    else:
        start, end, position = start + halo, end + halo, position + halo
        keys = -(-length // block) * block + 2 * halo
    intervals = np.stack([np.zeros_like(position), start, end, position], axis=1).astype(np.uint32)
    return GridAxis(keys, intervals, 1, block // stride)
