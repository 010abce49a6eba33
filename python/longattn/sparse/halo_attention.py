"""HaloNet's attention: blocks of queries, and keys of the block with a rim around it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, flag, integer, returned
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._grid import GridAxis, GridBias, attend, grid_inputs, grid_options, own_grid


def halo_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block: int = 8,
    halo: int = 3,
    rel_h: Array | None = None,
    rel_w: Array | None = None,
    scale_rel: bool = False,
    mask_pad: bool = True,
    stride: int = 1,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of a block of an image to the block's keys and those of a rim of `halo` pixels around it.

    The logit of a query and a key that lies `dy, dx` behind it is `scale * q . k + q . (rel_h[dy] + rel_w[dx])`,
    distances from `-(block + halo - 1)` to `block + halo - 1`. A side that is no multiple of the block ends in a
    short one.

    Implementations differ in two points, for which the original is not known: whether the relative part is multiplied
    by the scale too (`scale_rel`), and whether what lies outside the image is hidden, or zeros that take part in the
    softmax with the logit `q . (rel_h + rel_w)` (`mask_pad`).

    Args:
        q: queries `[B, Hq, Y, X, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Y, X, D]`; any of the three dtypes.
        v: values `[B, Hkv, Y, X, Dv]`; dtype of `k`.
        block: side of a block, in pixels.
        halo: width of the rim.
        rel_h: floating `[2 (block + halo) - 1, D]`: vectors by vertical distance, key less query.
        rel_w: likewise, by horizontal distance; both or neither.
        scale_rel: multiply the relative part by the scale as well.
        mask_pad: hide what lies outside the image; else it is zeros (a padded copy of `k` and `v`).
        stride: only every `stride`-th row and column of queries is computed; it divides the block.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        The output `[B, Hq, ceil(Y / stride), ceil(X / stride), Dv]`, in the kind and dtype of `q`. With `return_lse`,
        the pair with the lse, float32 of the same shape without `Dv`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a stride that does not divide the block.

    Cost:
        `Y X / stride**2 * (block + 2 halo)**2 * (D + Dv)` multiply-adds per query head; the relative part is one number
        per query, distance and axis.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 16, 16, 8), dtype=np.float32)
        >>> la.sparse.halo_attention(q, k, v, block=8, halo=3, stride=2).shape
        (1, 2, 8, 8, 8)
    """
    qn, kn, vn = grid_inputs(q, k, v)
    if qn.ndim != 5:
        raise ValueError(f"q: got shape {qn.shape}, expected rank 5, an image [B, H, Y, X, D]")
    lengths = own_grid(qn, kn)
    size, rim, step = integer(block, "block", 1), integer(halo, "halo", 0), integer(stride, "stride", 1)
    if size % step:
        raise ValueError(f"stride: got {step}, expected a divisor of the block {size}")
    scale_rel, mask_pad = flag(scale_rel, "scale_rel"), flag(mask_pad, "mask_pad")
    return_lse = flag(return_lse, "return_lse")
    dim = qn.shape[-1]
    tables = _tables(rel_h, rel_w, 2 * (size + rim) - 1, dim)
    axes = tuple(_axis(length, size, rim, step, mask_pad) for length in lengths)
    if not mask_pad:
        sides = [(rim, axis.keys - length - rim) for axis, length in zip(axes, lengths, strict=True)]
        kn, vn = (np.pad(x, ((0, 0), (0, 0), *sides, (0, 0))) for x in (kn, vn))
    if step > 1:
        qn = np.ascontiguousarray(qn[:, :, ::step, ::step])
    options = grid_options(qn.shape, scale, 0.0, None)
    bias = None
    if tables is not None:
        rows = qn.reshape(-1, dim).astype(np.float32, copy=False)
        factor = np.float32(options["scale"] if scale_rel else 1.0)
        zeros = (size + rim - 1,) * 2
        first, second = ((rows @ (factor * table.T)).reshape(*qn.shape[:-1], -1) for table in tables)
        bias = GridBias((first.shape[-1], second.shape[-1]), zeros, by_axis=(first, second))
    result, lse = attend(qn, kn, vn, axes, options, bias=bias)
    return returned(None, q, result, lse if return_lse else None)


def _tables(
    rel_h: Array | None, rel_w: Array | None, entries: int, dim: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Both tables, or none."""
    if rel_h is None and rel_w is None:
        return None
    found = []
    for table, name in ((rel_h, "rel_h"), (rel_w, "rel_w")):
        if table is None:
            raise ValueError(f"{name}: got none, expected both rel_h and rel_w, or neither")
        x = as_numpy(table, name)
        check_floating(x, name)
        if x.shape != (entries, dim):
            raise ValueError(f"{name}: got shape {x.shape}, expected {(entries, dim)}, 2 (block + halo) - 1 vectors")
        found.append(x.astype(np.float32, copy=False))
    return found[0], found[1]


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
        "Blocks of one pixel are neighbourhood attention away from borders.",
        "A block as large as the image, without a halo, is dense attention.",
        "A stride leaves out rows of the result without it.",
    ),
    tests="tests/sparse/test_halo_attention.py",
    cost="`prod(X) * (block + 2 * halo) ** 2 * (D + Dv)` multiply-adds per query head.",
    mask=lambda: seen(halo_attention, *example(144), shape=(12, 12), block=4, halo=1),
)
