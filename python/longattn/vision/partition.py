"""Grids cut into groups of tokens that attend to each other, and attention inside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import flag, integer, integers, scale_factor
from longattn.dense._options import Options
from longattn.dense.attention import attention
from longattn.sparse._grid import GridAxis, kernel_axes
from longattn.vision._inputs import Float32, grid, head_count, returned, same_shape

#: One number for all axes of a grid, or one for each.
Sizes = int | Sequence[int]


def partition(x: Array, size: Sizes, *, first: int = 1, interval: Sizes = 1, flat: bool = True) -> Array:
    """The tokens of a grid by groups of `size` positions per axis.

    Position `p = (r * size + g) * interval + i` of an axis belongs to group `(r, i)`, in which it is number `g`. So
    `interval=1` cuts windows; an interval of `X / size` gives groups of positions that lie that far apart over the
    whole axis; what is between is both. Groups are ordered by `(r1, i1, r2, i2, ...)`, tokens in them by
    `(g1, g2, ...)`, the last fastest.

    Args:
        x: array `[..., X1, .., Xn, ...]` of any dtype; each `Xi` a multiple of `size * interval` of its axis.
        size: positions of a group along each of the `n` axes; a number is one axis, unless `interval` has more.
        first: the axis that `X1` is.
        interval: positions from one of a group to its next; one number, or one for each axis.
        flat: join the axes of groups, and those of tokens.

    Returns:
        `[..., groups, tokens, ...]`, a copy where the axes do not join in memory; with `flat=False` the view
        `[..., X1 / (size1 * interval1), interval1, .., size1, .., sizen, ...]`, which costs nothing.

    Raises:
        TypeError: no array, or a size that is no integer.
        ValueError: sizes that do not divide their axes.

    Cost:
        One copy at most.

    Example:
        >>> import numpy as np, longattn.vision
        >>> x = np.arange(16).reshape(1, 4, 4, 1)
        >>> longattn.vision.partition(x, (2, 2))[0, 1, :, 0].tolist()
        [2, 3, 6, 7]
        >>> longattn.vision.partition(x, (2, 2), interval=2)[0, 1, :, 0].tolist()
        [1, 3, 9, 11]
    """
    a = as_numpy(x, "x", any_strides=True)
    start = integer(first, "first", 0, a.ndim)
    sizes, steps = sizes_of(size, "size", interval, a.ndim - start)
    n = len(sizes)
    extents = a.shape[start : start + n]
    for axis, (extent, s, i) in enumerate(zip(extents, sizes, steps, strict=True)):
        if extent % (s * i):
            raise ValueError(f"x: got axis {start + axis} of {extent}, expected a multiple of {s * i}")
    view = _cut(a, start, sizes, steps)
    if flag(flat, "flat"):
        groups = math.prod(extents) // math.prod(sizes)
        view = view.reshape(*a.shape[:start], groups, math.prod(sizes), *a.shape[start + n :])
    return like(x, view)


def unpartition(y: Array, shape: Sequence[int], size: Sizes, *, first: int = 1, interval: Sizes = 1) -> Array:
    """The grid whose groups `partition` gave.

    Args:
        y: array `[..., groups, tokens, ...]`.
        shape: `(X1, .., Xn)`.
        size: as in `partition`.
        first: the axis that `X1` becomes, where the groups are.
        interval: as in `partition`.

    Returns:
        `[..., X1, .., Xn, ...]`, a copy where axes do not join in memory.

    Raises:
        TypeError: no array, or a size that is no integer.
        ValueError: sizes that do not fit.

    Cost:
        One copy at most.
    """
    a = as_numpy(y, "y", any_strides=True)
    start = integer(first, "first", 0, a.ndim - 2)
    extents = integers(shape, "shape", 0)
    sizes, steps = sizes_of(size, "size", interval, len(extents), exactly=True)
    counts = []
    for extent, s, i in zip(extents, sizes, steps, strict=True):
        if extent % (s * i):
            raise ValueError(f"shape: got {extents}, expected multiples of {tuple(s * i for s in sizes)}")
        counts.append(extent // (s * i))
    groups, tokens = math.prod(extents) // math.prod(sizes), math.prod(sizes)
    if a.shape[start : start + 2] != (groups, tokens):
        raise ValueError(f"y: got shape {a.shape}, expected {groups} groups of {tokens} at axes {start}, {start + 1}")
    n = len(sizes)
    outer = [m for pair in zip(counts, steps, strict=True) for m in pair]
    view = a.reshape(*a.shape[:start], *outer, *sizes, *a.shape[start + 2 :])
    order = [axis for d in range(n) for axis in (start + 2 * d, start + 2 * n + d, start + 2 * d + 1)]
    moved = view.transpose(*range(start), *order, *range(start + 3 * n, view.ndim))
    return like(y, moved.reshape(*a.shape[:start], *extents, *a.shape[start + 2 :]))


def grouped_attention(
    q: Array,
    k: Array,
    v: Array,
    size: Sizes,
    *,
    heads: int = 1,
    interval: Sizes = 1,
    shift: Sizes = 0,
    scale: float | None = None,
    bias: Array | None = None,
    mask_pad: bool = True,
) -> Array:
    """Multi-head attention inside the groups of a grid: windows, shifted windows, tiles, strided groups.

    A grid that is no multiple of `size * interval` is padded with zeros after its ends. With `shift` the grid is
    first rolled by that much, and positions that the roll brought together from opposite ends do not see each other.

    Args:
        q: queries `[B, X1, .., Xn, heads * D]`, n = 1 to 3; float32, float16 or bfloat16.
        k: keys, likewise.
        v: values `[B, X1, .., Xn, heads * Dv]`.
        size: positions of a group along each axis, as in `partition`.
        heads: heads, side by side in the channels.
        interval: as in `partition`.
        shift: roll along each axis, below `size`; where an axis is one group, it is not rolled.
        scale: factor on the logits; `None` is `D ** -0.5`.
        bias: floating, broadcastable to `[heads, tokens, tokens]`: added to the logits of each group.
        mask_pad: padded keys are not seen; otherwise they are keys and values of zeros.

    Returns:
        `[B, X1, .., Xn, heads * Dv]`, in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `tokens of the grid * tokens of a group * heads * (D + Dv)` multiply-adds. With `bias`, with padded keys, and
        where an interval is shifted, copies of all arrays by groups.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 14, 14, 32), dtype=np.float32)
        >>> longattn.vision.grouped_attention(q, k, v, 7, heads=4, shift=3).shape
        (1, 14, 14, 32)
    """
    qn = grid(q, "q", (1, 2, 3))
    kn = same_shape(k, "k", qn, "q")
    vn = grid(v, "v", qn.ndim - 2)
    if vn.shape[:-1] != qn.shape[:-1]:
        raise ValueError(f"v: got shape {vn.shape}, expected {(*qn.shape[:-1], 'heads * Dv')}")
    number = head_count(heads, {"q": qn.shape[-1], "v": vn.shape[-1]})
    extents = qn.shape[1:-1]
    sizes, steps = sizes_of(size, "size", interval, len(extents), exactly=True)
    rolls = _rolls(shift, sizes, extents)
    padded = tuple(-(-x // (s * i)) * s * i for x, s, i in zip(extents, sizes, steps, strict=True))
    valid = extents if flag(mask_pad, "mask_pad") else None
    if bias is None and valid is not None and not _rolls_intervals(steps, rolls):
        return returned(q, _attend_in_ranges(qn, kn, vn, sizes, steps, rolls, number, scale))
    qn, kn, vn = (pad_ends(x, padded) for x in (qn, kn, vn))
    out = attend_in_groups(
        qn, kn, vn, sizes, heads=number, steps=steps, rolls=rolls, scale=scale, bias=bias, valid=valid
    )  # fmt: skip
    return returned(q, out[(slice(None), *(slice(n) for n in extents))])


def attend_in_groups(
    q: Float32,
    k: Float32,
    v: Float32,
    sizes: tuple[int, ...],
    *,
    heads: int,
    steps: tuple[int, ...] | None = None,
    rolls: tuple[int, ...] | None = None,
    scale: float | None = None,
    bias: Array | None = None,
    valid: tuple[int, ...] | None = None,
) -> Float32:
    """Attention inside groups of grids that are whole multiples of them; keys from `valid` on are not seen."""
    n = len(sizes)
    steps, rolls = steps or (1,) * n, rolls or (0,) * n
    extents = q.shape[1 : n + 1]
    axes = tuple(range(1, n + 1))
    if bias is None and valid in (None, extents) and not _rolls_intervals(steps, rolls):
        return _attend_in_ranges(q, k, v, sizes, steps, rolls, heads, scale)
    rolled = any(rolls)
    if rolled:
        q, k, v = (np.roll(x, [-r for r in rolls], axis=axes) for x in (q, k, v))
    parts = [partition(x, sizes, interval=steps) for x in (q, k, v)]
    segments = None
    if rolled or (valid is not None and valid != extents):
        ids = _regions(extents, sizes, rolls, valid or extents)
        own = partition(ids[None], sizes, interval=steps)[0]
        own = np.broadcast_to(own, (len(q), *own.shape)).reshape(-1, own.shape[-1])
        segments = (np.maximum(own, 0), own)
    out = attend(*(x.reshape(-1, *x.shape[2:]) for x in parts), heads=heads, scale=scale, bias=bias, segments=segments)
    back: Float32 = unpartition(out.reshape(*parts[2].shape), extents, sizes, interval=steps)
    if rolled:
        back = np.roll(back, rolls, axis=axes)
    return back


def _rolls_intervals(steps: tuple[int, ...], rolls: tuple[int, ...]) -> bool:
    """Whether groups are no ranges of every so many-th position."""
    return any(rolls) and max(steps) > 1


def _attend_in_ranges(
    q: Float32,
    k: Float32,
    v: Float32,
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
    rolls: tuple[int, ...],
    heads: int,
    scale: float | None,
) -> Float32:
    """Attention inside groups that are a range of every so many-th position along each axis: nothing is copied."""
    axes = [_ranges(*given) for given in zip(q.shape[1:-1], sizes, steps, rolls, strict=True)]
    out = np.empty((*q.shape[:-1], v.shape[-1]), np.float32)
    q4, k4, v4, out4 = (_split(reshaped(x, len(x), -1, x.shape[-1]), heads) for x in (q, k, v, out))
    if out.size:
        lse = np.empty(q4.shape[:3], np.float32)
        options: Options = {"scale": scale_factor(scale, q4.shape[3])}
        _core.neighbourhood(q4, k4, v4, out4, lse, kernel_axes(axes), None, options)
    return out


def _ranges(length: int, size: int, step: int, roll: int) -> GridAxis:
    """What positions of an axis see: those of their group. Groups of a rolled axis begin at `roll` plus multiples."""
    position = np.arange(length, dtype=np.int64)
    group, u = position % step, position // step
    count = (length - group + step - 1) // step
    first = (u - roll) // size * size + roll
    intervals = np.stack([group, np.maximum(first, 0), np.minimum(first + size, count), u], axis=1)
    return GridAxis(length, intervals.astype(np.uint32), step, size)


def attend_over(
    q: Array, k: Array, v: Array, axes: str, over: str, *, heads: int = 1, return_lse: bool = False, **options: Any
) -> Any:
    """Multi-head attention over some axes of arrays, each index of the others by itself.

    One function for every layout of views, frames and places: with `axes="bvfn"`, `over="vn"` attends across views,
    `over="fn"` across frames, `over="n"` inside each frame of each view.

    Args:
        q: queries `[*axes, heads * D]`; float32, float16 or bfloat16.
        k: keys `[*axes, heads * D]`, in the axes of `over` of any length; any of the three dtypes.
        v: values `[*axes, heads * Dv]`, of the lengths of `k`; dtype of `k`.
        axes: a letter for each axis but the channels.
        over: the axes that are joined into one sequence, in this order, the last fastest.
        heads: heads, side by side in the channels.
        return_lse: also return the log-sum-exp of the logits.
        options: those of `longattn.attention`, for scores `[other axes joined, heads, Lq, Lk]`.

    Returns:
        `[*axes, heads * Dv]` as `q`, in its kind and dtype; with `return_lse` the pair with lse, float32
        `[*axes, heads]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or names that do not fit.

    Cost:
        That of `longattn.attention`; a copy of each array whose axes do not join in memory.

    Example:
        >>> import numpy as np, longattn.vision
        >>> x = np.random.default_rng(0).standard_normal((1, 2, 3, 16, 8), dtype=np.float32)
        >>> longattn.vision.attend_over(x, x, x, "bvfn", "vn", heads=2).shape
        (1, 2, 3, 16, 8)
    """
    names, joined = _axis_names(axes, over)
    qn, kn, vn = (as_numpy(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    for x, name in ((qn, "q"), (kn, "k"), (vn, "v")):
        if x.ndim != len(names) + 1:
            raise ValueError(f"{name}: got shape {x.shape}, expected axes {axes!r} and channels")
        if x is not qn and any(x.shape[a] != qn.shape[a] for a in range(len(names)) if a not in joined):
            raise ValueError(f"{name}: got shape {x.shape}, expected {qn.shape} as q but along {over!r}")
    if kn.shape[:-1] != vn.shape[:-1]:
        raise ValueError(f"v: got shape {vn.shape}, expected {kn.shape[:-1]} as k, and channels")
    number = head_count(heads, {"q": qn.shape[-1], "k": kn.shape[-1], "v": vn.shape[-1]})
    others = [a for a in range(len(names)) if a not in joined]
    order = (*others, *joined, len(names))
    moved = [x.transpose(order) for x in (qn, kn, vn)]
    lead = [qn.shape[a] for a in others]
    rows = [reshaped(x, math.prod(lead), -1, x.shape[-1]) for x in moved]
    out, lse = attend(*rows, heads=number, return_lse=True, **options)
    inverse = np.argsort(order)
    result = out.reshape(*moved[0].shape[:-1], vn.shape[-1]).transpose(inverse)
    if not flag(return_lse, "return_lse"):
        return like(q, np.ascontiguousarray(result))
    sums = lse.swapaxes(1, 2).reshape(*moved[0].shape[:-1], number).transpose(inverse)
    return like(q, np.ascontiguousarray(result)), like(q, np.ascontiguousarray(sums))


def attend(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, heads: int, return_lse: bool = False, **options: Any
) -> Any:
    """Attention of rows `[B, L, heads * D]` whose heads lie side by side; nothing is copied.

    With `return_lse` the pair with lse `[B, heads, L]`.
    """
    out = np.empty((*q.shape[:2], v.shape[2]), q.dtype)
    result = attention(
        *(_split(x, heads) for x in (q, k, v)),
        out=_split(out, heads),
        return_lse=return_lse,
        **options,
    )
    return (out, result[1]) if return_lse else out


def _split(x: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows `[B, L, heads * D]` as `[B, heads, L, D]`."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


def pad_ends(x: NDArray[Any], extents: tuple[int, ...]) -> NDArray[Any]:
    """A grid `[B, X1, .., Xn, ...]` with zeros after the ends of its axes, up to `extents`."""
    n = len(extents)
    if x.shape[1 : n + 1] == extents:
        return x
    after = [(0, to - have) for to, have in zip(extents, x.shape[1 : n + 1], strict=True)]
    return np.pad(x, [(0, 0), *after, *[(0, 0)] * (x.ndim - n - 1)])


def padded_to(extents: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """The next multiples."""
    return tuple(-(-x // s) * s for x, s in zip(extents, sizes, strict=True))


def sizes_of(
    size: Sizes, name: str, interval: Sizes, axes: int, *, exactly: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and intervals of at most (or exactly) as many axes as there are."""
    if isinstance(size, Sequence):
        sizes = tuple(integer(n, name, 1) for n in size)
    else:
        one = integer(size, name, 1)
        count = len(interval) if isinstance(interval, Sequence) else (axes if exactly else 1)
        sizes = (one,) * count
    if not sizes or len(sizes) > axes or (exactly and len(sizes) != axes):
        raise ValueError(f"{name}: got {len(sizes)} numbers, expected one for each of {axes} axes")
    if isinstance(interval, Sequence):
        steps = tuple(integer(n, "interval", 1) for n in interval)
    else:
        steps = (integer(interval, "interval", 1),) * len(sizes)
    if len(steps) != len(sizes):
        raise ValueError(f"interval: got {len(steps)} numbers, expected {len(sizes)} as {name}")
    return sizes, steps


def _cut(a: NDArray[Any], start: int, sizes: tuple[int, ...], steps: tuple[int, ...]) -> NDArray[Any]:
    """The view `[..., r1, i1, .., g1, .., ...]`."""
    n = len(sizes)
    split = [m for x, s, i in zip(a.shape[start:], sizes, steps, strict=False) for m in (x // (s * i), s, i)]
    view = a.reshape(*a.shape[:start], *split, *a.shape[start + n :])
    outer = [axis for d in range(n) for axis in (start + 3 * d, start + 3 * d + 2)]
    inner = [start + 3 * d + 1 for d in range(n)]
    return view.transpose(*range(start), *outer, *inner, *range(start + 3 * n, view.ndim))


def _rolls(shift: Sizes, sizes: tuple[int, ...], extents: tuple[int, ...]) -> tuple[int, ...]:
    given = shift if isinstance(shift, Sequence) else (shift,) * len(sizes)
    if len(given) != len(sizes):
        raise ValueError(f"shift: got {len(given)} numbers, expected {len(sizes)} as size")
    rolls = tuple(integer(r, "shift", 0, s - 1) for r, s in zip(given, sizes, strict=True))
    return tuple(0 if s >= x else r for r, s, x in zip(rolls, sizes, extents, strict=True))


def _regions(
    extents: tuple[int, ...], sizes: tuple[int, ...], rolls: tuple[int, ...], valid: tuple[int, ...]
) -> NDArray[np.int32]:
    """A number for each place of the rolled grid, the same for places that may see each other; -1 for padding."""
    ids = np.zeros(extents, np.int32)
    padding = np.zeros(extents, bool)
    for axis, (x, r, n) in enumerate(zip(extents, rolls, valid, strict=True)):
        source = (np.arange(x) + r) % x
        shape = [-1 if a == axis else 1 for a in range(len(extents))]
        # Places that wrapped around come after all others.
        ids = 2 * ids + (source < r).astype(np.int32).reshape(shape)
        padding |= (source >= n).reshape(shape)
    return np.where(padding, np.int32(-1), ids)


def _axis_names(axes: object, over: object) -> tuple[str, list[int]]:
    for names, name in ((axes, "axes"), (over, "over")):
        if not isinstance(names, str):
            raise TypeError(f"{name}: got {names!r}, expected a string of letters")
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{name}: got {names!r}, expected different letters, at least one")
    axes, over = str(axes), str(over)
    if not set(over) <= set(axes):
        raise ValueError(f"over: got {over!r}, expected letters of {axes!r}")
    return axes, [axes.index(letter) for letter in over]
