"""What halo attention and its gradients are given: checked once, in the form the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, flag, scale_factor
from longattn.sparse._grid import GridAxis, GridBias, grid_inputs, own_grid, per_axis

#: The most places along an axis: kernels count them in 32 bits.
_MOST_PLACES = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Halo:
    """A checked call.

    Attributes:
        q: queries `[B, Hq, X1.., D]`; of `laid_out` every `stride`-th, `[B, Hq, Y1.., D]`.
        k: keys `[B, Hkv, X1.., D]`; of `laid_out` with zeros around them where these count.
        v: values, likewise.
        shape: of the queries that are computed, `[B, Hq, Y1..]`.
        axes: what the queries see of them.
        tables: the relative vectors of each axis, or `None`.
        scale: factor on the dot products.
        relative_scale: factor on the relative part.
        every: where the queries that are computed lie among those that were given.
        inside: where the keys that were given lie among those with zeros around them.
        first: for each axis and query the first place of its block's region, inside the grid or not, counted as the
            keys of `axes` are.
        sides: places of a region along each axis.
    """

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    shape: tuple[int, ...]
    axes: tuple[GridAxis, ...]
    tables: tuple[NDArray[np.float32], ...] | None
    scale: float
    relative_scale: float
    every: tuple[slice, ...]
    inside: tuple[slice, ...]
    first: tuple[NDArray[np.int64], ...]
    sides: tuple[int, ...]

    def laid_out(self) -> Halo:
        """The call with the queries, keys and values that the kernels read."""
        q, k, v = self.q, self.k, self.v
        if self.shape != q.shape[:-1]:
            q = np.ascontiguousarray(q[self.every])
        sides = [(at.start, axis.keys - at.stop) for at, axis in zip(self.inside[2:], self.axes, strict=True)]
        if any(map(any, sides)):
            k, v = (np.pad(x, ((0, 0), (0, 0), *sides, (0, 0))) for x in (k, v))
        return replace(self, q=q, k=k, v=v)

    def rows(self) -> NDArray[np.float32]:
        """The queries one after another, as factors of the tables, `[B * Hq * Y, D]`."""
        return self.q.reshape(-1, self.q.shape[-1]).astype(np.float32, copy=False)

    @np.errstate(over="ignore", invalid="ignore")  # infinite numbers, of which the kernels do not warn either
    def by_axis(self) -> tuple[NDArray[np.float32], ...]:
        """The relative part of each query by distance, per axis `[B, Hq, Y1.., entries]`."""
        rows, factor = self.rows(), np.float32(self.relative_scale)
        return tuple((rows @ (factor * table.T)).reshape(*self.shape, len(table)) for table in self.tables or ())

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
    return Halo(
        q=qn,
        k=kn,
        v=vn,
        shape=(*qn.shape[:2], *(len(axis.intervals) for axis in axes)),
        axes=axes,
        tables=tables,
        scale=factor,
        relative_scale=factor if with_scale else 1.0,
        every=(slice(None), slice(None), *(slice(None, None, step) for step in steps)),
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
        with np.errstate(over="ignore"):
            found.append(x.astype(np.float32, copy=False))
    return tuple(found)


def _first(length: int, block: int, halo: int, stride: int) -> NDArray[np.int64]:
    """Where the regions of an axis' queries begin."""
    return np.arange(0, length, stride) // block * block - halo


def _axis(length: int, block: int, halo: int, stride: int, hides: bool) -> GridAxis:
    """Every `stride`-th query sees its block and `halo` keys on both sides, of the axis or of the padded one."""
    position, start, keys = np.arange(0, length, stride), _first(length, block, halo, stride), length
    if hides:
        end = np.minimum(start + halo + min(block + halo, length), length)
        start = np.maximum(start, 0)
    else:
        keys = -(-length // block) * block + 2 * halo
        if keys > _MOST_PLACES:
            raise ValueError(
                f"block: got {block} with a halo of {halo} and zeros around the grid (mask_pad), expected at most "
                f"{_MOST_PLACES} places along an axis"
            )
        start, position = start + halo, position + halo
        end = start + block + 2 * halo
    intervals = np.stack([np.zeros_like(position), start, end, position], axis=1).astype(np.uint32)
    return GridAxis(keys, intervals, 1, block // stride)
