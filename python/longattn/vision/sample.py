"""Features between the places of a grid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_float_storage, check_floating, flag, integer, one_of

#: What coordinates outside the grid see.
PADDINGS = ("zeros", "border")
#: How coordinates count.
UNITS = ("unit", "pixel")


def sample(
    x: Array,
    coords: Array,
    *,
    weights: Array | None = None,
    groups: int = 1,
    coordinates: str = "unit",
    align_corners: bool = True,
    padding: str = "zeros",
) -> Array:
    """Features at real coordinates, by linear interpolation (bilinear, trilinear) between the places around them.

    What `torch.nn.functional.grid_sample` gives, channels last and coordinates in the order of the axes; with
    `weights`, sums of several samples, as deformable attention takes them.

    Args:
        x: grid `[B, X1, .., Xn, C]`, n = 1 to 3; float32, float16 or bfloat16. `B` may be 1 for any batch of `coords`.
        coords: floating, finite, `[B, ..., n]`: coordinates in the order of the axes (y before x); with `weights`
            `[B, ..., K, n]`; with `groups` above 1 `[B, ..., groups, n]`, or `[B, ..., K, groups, n]`.
        weights: floating, the shape of `coords` without its last axis: the `K` samples are multiplied and summed.
        groups: equal parts of the channels that have coordinates of their own.
        coordinates: "unit": from -1 to 1; "pixel": 0 is the first place, `X - 1` the last.
        align_corners: for "unit": -1 and 1 are the centres of the outermost places; otherwise their outer edges, half
            a place further out.
        padding: "zeros": places outside the grid are zeros; "border": coordinates outside are moved to the nearest
            place inside.

    Returns:
        `[B, ..., C]` in the kind and dtype of `x`; arithmetic is float32. A place that has no share in a sample is not
        read.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, coordinates that are not finite.

    Cost:
        `2 ** n` multiply-adds per number sampled. `coords` that are not float32, or not contiguous, cost a copy, and
        so does an `x` whose axes before the last but one do not join in memory.

    Example:
        >>> import numpy as np, longattn.vision
        >>> x = np.arange(4.0, dtype=np.float32).reshape(1, 2, 2, 1)
        >>> longattn.vision.sample(x, np.zeros((1, 1, 2)))[0, 0]
        array([1.5], dtype=float32)
    """
    xn, cn = as_numpy(x, "x"), as_numpy(coords, "coords")
    check_float_storage(xn, "x")
    check_floating(cn, "coords")
    axes = xn.ndim - 2
    if not 1 <= axes <= 3:
        raise ValueError(f"x: got shape {xn.shape}, expected [B, X1, .., Xn, C] with n = 1 to 3")
    if 0 in xn.shape[1:]:
        raise ValueError(f"x: got an empty axis in shape {xn.shape}, expected none")
    parts = integer(groups, "groups", 1)
    if xn.shape[-1] % parts:
        raise ValueError(f"groups: got {parts}, expected a divisor of {xn.shape[-1]} channels")
    inner = (parts,) if parts > 1 else ()
    least = 2 + len(inner) + (weights is not None)
    if cn.ndim < least or cn.shape[-1] != axes or cn.shape[cn.ndim - 1 - len(inner) : -1] != inner:
        wanted = ["B", "..."] + ["K"] * (weights is not None) + [str(n) for n in (*inner, axes)]
        raise ValueError(f"coords: got shape {cn.shape}, expected [{', '.join(wanted)}]")
    if xn.shape[0] not in (1, cn.shape[0]):
        raise ValueError(f"x: got batch {xn.shape[0]}, expected {cn.shape[0]} as in coords, or 1")
    places, taps = cn.shape[: cn.ndim - 1 - len(inner)], 1
    factors = None
    if weights is not None:
        wn = as_numpy(weights, "weights")
        check_floating(wn, "weights")
        if wn.shape != cn.shape[:-1]:
            raise ValueError(f"weights: got shape {wn.shape}, expected {cn.shape[:-1]} as coords")
        factors = np.ascontiguousarray(wn, np.float32).reshape(-1)
        places, taps = places[:-1], places[-1]
    one_of(coordinates, "coordinates", UNITS)
    one_of(padding, "padding", PADDINGS)
    aligned = flag(align_corners, "align_corners")
    if not np.isfinite(cn).all():
        raise ValueError("coords: got NaN or infinity, expected finite numbers")
    flat = np.ascontiguousarray(cn, np.float32).reshape(-1)
    out = np.zeros(math.prod(places) * xn.shape[-1], np.float32)
    if out.size and taps:
        rows = grid_rows(np.broadcast_to(xn, (cn.shape[0], *xn.shape[1:])))
        _core.sample(
            rows, extent_of(xn.shape[1:-1]), flat, axes, parts, taps, factors,
            coordinates == "unit", aligned, padding == "border", out,
        )  # fmt: skip
    return like(x, out.reshape(*places, xn.shape[-1]).astype(xn.dtype, copy=False))


def unit_grid(extents: tuple[int, ...], *, align_corners: bool = True) -> Any:
    """Coordinates from -1 to 1 of every place of a grid, float64 `[X1, .., Xn, n]`."""
    lines = [np.full(1, 0.0) if n == 1 else np.linspace(-1, 1, n) for n in extents]
    if not align_corners:
        lines = [(2 * np.arange(n) + 1) / n - 1 for n in extents]
    return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1)


def resize(x: Any, extents: tuple[int, ...]) -> Any:
    """A grid at another resolution, linear between centres of places (`align_corners=False`), without smoothing."""
    n = len(extents)
    if x.shape[1 : n + 1] == extents:
        return x
    at = np.broadcast_to(unit_grid(extents, align_corners=False), (len(x), *extents, n))
    return sample(x, at, align_corners=False, padding="border")


def grid_rows(x: Any) -> Any:
    """A grid as `[B, T * Y, X, C]`."""
    while x.ndim < 5:
        x = x[:, None]
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def extent_of(extents: tuple[int, ...], fill: int = 1) -> list[int]:
    """One number for each of t, y and x, `fill` for axes that a grid lacks."""
    return [fill] * (3 - len(extents)) + list(extents)
