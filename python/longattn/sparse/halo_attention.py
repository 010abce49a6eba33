"""HaloNet's attention: blocks of queries, and keys of the block with a rim around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, flag, returned
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._grid import GridAxis, GridBias, attend, grid_inputs, grid_options, own_grid, per_axis


def halo_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block: int | Sequence[int] = 8,
    halo: int | Sequence[int] = 3,
    relative: Sequence[Array] | None = None,
    scale_rel: bool = False,
    mask_pad: bool = True,
    stride: int | Sequence[int] = 1,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of a block of a grid to the block's keys and those of a rim of `halo` places around it.

    The grid is a text, an image or a video: one to three axes. The logit of a query and a key that lies `d_a` behind it
    on axis `a` is `scale * q . k + q . sum_a relative[a][d_a]`, distances from `-(block + halo - 1)` to
    `block + halo - 1`. An axis that is no multiple of the block ends in a short one.

    Implementations differ in two points, for which the original is not known: whether the relative part is multiplied
    by the scale too (`scale_rel`), and whether what lies outside the grid is hidden, or zeros that take part in the
    softmax with the logit of the relative part (`mask_pad`).

    Args:
        q: queries `[B, Hq, X1.., D]`, one to three axes (the paper's images are `[B, Hq, Y, X, D]`); float32, float16
            or bfloat16.
        k: keys `[B, Hkv, X1.., D]`; any of the three dtypes.
        v: values `[B, Hkv, X1.., Dv]`; dtype of `k`.
        block: places of a block, one number or one per axis.
        halo: width of the rim, likewise.
        relative: for each axis floating `[2 (block + halo) - 1, D]`: vectors by distance, key less query; `None`: none.
        scale_rel: multiply the relative part by the scale as well.
        mask_pad: hide what lies outside the grid; else it is zeros (a padded copy of `k` and `v`).
        stride: only every `stride`-th query of each axis is computed, one number or one per axis; it divides the block.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        The output `[B, Hq, ceil(X1 / stride).., Dv]`, in the kind and dtype of `q`. With `return_lse`, the pair with
        the lse, float32 of the same shape without `Dv`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a stride that does not divide the block.

    Cost:
        `prod(X / stride) * prod(block + 2 * halo) * (D + Dv)` multiply-adds per query head; the relative part is one
        number per query, distance and axis.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 16, 16, 8), dtype=np.float32)
        >>> la.sparse.halo_attention(q, k, v, block=8, halo=3, stride=2).shape
        (1, 2, 8, 8, 8)
    """
    qn, kn, vn = grid_inputs(q, k, v)
    lengths = own_grid(qn, kn)
    count, dim = len(lengths), qn.shape[-1]
    sizes, rims = per_axis(block, "block", count, 1), per_axis(halo, "halo", count, 0)
    steps = per_axis(stride, "stride", count, 1)
    for size, step in zip(sizes, steps, strict=True):
        if size % step:
            raise ValueError(f"stride: got {step}, expected a divisor of the block {size}")
    scale_rel, mask_pad = flag(scale_rel, "scale_rel"), flag(mask_pad, "mask_pad")
    return_lse = flag(return_lse, "return_lse")
    entries = [2 * (size + rim) - 1 for size, rim in zip(sizes, rims, strict=True)]
    tables = None if relative is None else _tables(relative, entries, dim)
    axes = tuple(_axis(*given, mask_pad) for given in zip(lengths, sizes, rims, steps, strict=True))
    if not mask_pad:
        sides = [(rim, axis.keys - n - rim) for rim, axis, n in zip(rims, axes, lengths, strict=True)]
        kn, vn = (np.pad(x, ((0, 0), (0, 0), *sides, (0, 0))) for x in (kn, vn))
    if max(steps) > 1:
        qn = np.ascontiguousarray(qn[(slice(None), slice(None), *(slice(None, None, step) for step in steps))])
    options = grid_options(qn.shape, scale, 0.0, None)
    bias = None
    if tables is not None:
        rows = qn.reshape(-1, dim).astype(np.float32, copy=False)
        factor = np.float32(options["scale"] if scale_rel else 1.0)
        by_axis = tuple((rows @ (factor * table.T)).reshape(*qn.shape[:-1], -1) for table in tables)
        bias = GridBias(tuple(entries), tuple(n // 2 for n in entries), by_axis=by_axis)
    result, lse = attend(qn, kn, vn, axes, options, bias=bias)
    return returned(None, q, result, lse if return_lse else None)


def _tables(relative: Sequence[Array], entries: Sequence[int], dim: int) -> list[NDArray[np.float32]]:
    """A checked table for each axis."""
    if not isinstance(relative, Sequence):
        raise TypeError(f"relative: got {type(relative).__name__}, expected a sequence of a table for each axis")
    if len(relative) != len(entries):
        raise ValueError(f"relative: got {len(relative)} tables, expected {len(entries)}, one per axis of the grid")
    found = []
    for a, (table, count) in enumerate(zip(relative, entries, strict=True)):
        x = as_numpy(table, f"relative[{a}]")
        check_floating(x, f"relative[{a}]")
        if x.shape != (count, dim):
            raise ValueError(f"relative[{a}]: got shape {x.shape}, expected {(count, dim)}, 2 (block + halo) - 1 rows")
        found.append(x.astype(np.float32, copy=False))
    return found


def _axis(length: int, block: int, halo: int, stride: int, mask_pad: bool) -> GridAxis:
    """Every `stride`-th query sees its block and `halo` keys on both sides, of the axis or of the padded one."""
    x = np.arange(0, length, stride)
    first = x // block * block
    start, end, position, keys = first - halo, first + block + halo, x, length
    if mask_pad:
        start, end = np.maximum(start, 0), np.minimum(end, length)
    else:
        start, end, position, keys = start + halo, end + halo, x + halo, -(-length // block) * block + 2 * halo
    intervals = np.stack([np.zeros_like(x), start, end, position], axis=1).astype(np.uint32)
    return GridAxis(keys, intervals, 1, block // stride)


METHOD = Method(
    name="halo_attention",
    family="sparse",
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    year=2021,
    arxiv="2103.12731",
    function=halo_attention,
    reference=reference.halo_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "Without a halo it is attention inside windows.",
        "Blocks of one place are neighbourhood attention away from borders.",
        "A block as large as the grid, without a halo, is dense attention.",
        "A stride leaves out rows of the result without it.",
        "An axis of one place changes nothing.",
    ),
    tests="tests/sparse/test_halo_attention.py",
    cost="`prod(X / stride) * prod(block + 2 * halo) * (D + Dv)` multiply-adds per query head.",
    mask=lambda: seen(halo_attention, *example(144), shape=(12, 12), block=4, halo=1),
)
