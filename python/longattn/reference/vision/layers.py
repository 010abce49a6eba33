"""What the references of `longattn.vision` share.

Projections, attention with explicit weights, convolutions tap by tap, interpolation place by place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def wide(x: ArrayLike) -> Float64:
    """As float64."""
    return np.asarray(x, np.float64)


def linear(x: ArrayLike, w: Any) -> Float64:
    """`x @ matrix + bias`, of a matrix or a pair; `None` leaves `x`."""
    if w is None:
        return wide(x)
    matrix, bias = w if isinstance(w, tuple | list) else (w, None)
    y: Float64 = wide(x) @ wide(matrix)
    return y if bias is None else y + wide(bias)


def softmax(s: Float64) -> Float64:
    """Along the last axis; rows of -inf give zeros."""
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isfinite(top), top, 0.0))
    total = p.sum(axis=-1, keepdims=True)
    return p / np.where(total == 0, 1.0, total)


def attend(
    q: Float64,
    k: Float64,
    v: Float64,
    heads: int = 1,
    scale: float | None = None,
    bias: Any = 0.0,
    mask: Any = True,
) -> Float64:
    """Attention of rows `[..., L, heads * D]`; `bias` and `mask` broadcast to `[..., heads, Lq, Lk]`."""
    qh, kh, vh = (np.moveaxis(x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads), -2, -3) for x in (q, k, v))
    factor = qh.shape[-1] ** -0.5 if scale is None else scale
    s = factor * (qh @ kh.swapaxes(-1, -2)) + bias
    out = np.moveaxis(softmax(np.where(mask, s, -np.inf)) @ vh, -3, -2)
    return out.reshape(*out.shape[:-2], v.shape[-1])


def places(extents: Any) -> NDArray[np.int64]:
    """Coordinates of every place of a grid, `[places, n]`."""
    return np.array(list(itertools.product(*(range(n) for n in extents))), np.int64).reshape(-1, len(extents))


def flat(x: Float64) -> Float64:
    """A grid `[B, X1, .., Xn, C]` as rows `[B, places, C]`."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def layer_norm(x: Float64, weight: ArrayLike, bias: ArrayLike, eps: float = 1e-5) -> Float64:
    """Over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    out: Float64 = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * wide(weight) + wide(bias)
    return out


def gelu(x: Float64) -> Float64:
    """`x * Phi(x)`."""
    out: Float64 = x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))
    return out


def _taps(x: Float64, taps: tuple[int, ...], stride: int, padding: int | str) -> Iterator[tuple[Any, Float64]]:
    """Each tap of a kernel, and what it meets at every output."""
    before = [k // 2 for k in taps] if padding == "same" else [int(padding)] * len(taps)
    x = np.pad(x, [(0, 0), *((p, p) for p in before), (0, 0)])
    outputs = [(m - k) // stride + 1 for m, k in zip(x.shape[1:-1], taps, strict=True)]
    for tap in itertools.product(*(range(k) for k in taps)):
        yield (
            tap,
            x[(slice(None), *(slice(t, t + stride * o, stride) for t, o in zip(tap, outputs, strict=True)))][
                (slice(None), *(slice(o) for o in outputs))
            ],
        )


def convolution(x: Float64, kernel: ArrayLike, stride: int = 1, padding: int | str = "same") -> Float64:
    """Of a grid `[B, X1, .., Xn, C]` with `[k1, .., kn, C, C']`."""
    w = wide(kernel)
    return np.asarray(sum(part @ w[tap] for tap, part in _taps(x, w.shape[: x.ndim - 2], stride, padding)))


def depthwise(x: Float64, kernel: ArrayLike, stride: int = 1, padding: int | str = "same") -> Float64:
    """Of each channel by itself, with `[k1, .., kn, C]`."""
    w = wide(kernel)
    return np.asarray(sum(part * w[tap] for tap, part in _taps(x, w.shape[: x.ndim - 2], stride, padding)))


def sample(
    x: Float64, coords: ArrayLike, *, coordinates: str = "unit", align_corners: bool = True, padding: str = "zeros"
) -> Float64:
    """Of a grid `[B, X1, .., Xn, C]` at `[B, ..., n]`."""
    n = x.ndim - 2
    extents = np.array(x.shape[1:-1])
    at = wide(coords)
    if coordinates == "unit":
        at = (at + 1) / 2 * (extents - 1) if align_corners else ((at + 1) * extents - 1) / 2
    if padding == "border":
        at = np.clip(at, 0, extents - 1)
    low = np.floor(at)
    batch = np.arange(len(at)).reshape(-1, *(1,) * (at.ndim - 2)) if len(x) > 1 else 0
    out = np.zeros((*at.shape[:-1], x.shape[-1]))
    for corner in itertools.product((0, 1), repeat=n):
        place = low + corner
        inside = ((place >= 0) & (place < extents)).all(axis=-1)
        weight = np.where(inside, np.prod(1 - np.abs(at - place), axis=-1), 0.0)
        index = np.moveaxis(np.clip(place, 0, extents - 1).astype(np.int64), -1, 0)
        out += weight[..., None] * x[(batch, *index)]
    return out


def resize(x: Float64, extents: Any) -> Float64:
    """A grid at another resolution, linear between centres of places."""
    have = np.array(x.shape[1:-1])
    at = (places(extents) + 0.5) * have / np.array(extents) - 0.5
    at = np.broadcast_to(at.reshape(1, *extents, -1), (len(x), *extents, have.size))
    return sample(x, at, coordinates="pixel", padding="border")


def relative_bias(table: ArrayLike, size: Any, key_size: Any | None = None) -> Float64:
    """Bias `[heads, queries, keys]` from a table `[prod(size + key_size - 1), heads]` by query less key."""
    keys = size if key_size is None else key_size
    t = wide(table).reshape(*(a + b - 1 for a, b in zip(size, keys, strict=True)), -1)
    d = places(size)[:, None] - places(keys)[None] + np.array(keys) - 1
    return np.moveaxis(t[tuple(np.moveaxis(d, -1, 0))], -1, 0)


def offset_bias(table: ArrayLike, size: Any) -> Float64:
    """Bias `[heads, tokens, tokens]` from a table `[heads, prod(size)]` by magnitudes of offsets."""
    t = wide(table).reshape(-1, *size)
    d = np.abs(places(size)[:, None] - places(size)[None])
    return t[(slice(None), *np.moveaxis(d, -1, 0))]


def padded(x: Float64, multiples: Any) -> Float64:
    """A grid with zeros after its ends, up to multiples."""
    after = [(0, -m % s) for m, s in zip(x.shape[1:-1], multiples, strict=True)]
    return np.pad(x, [(0, 0), *after, (0, 0)])


def pool_cells(x: Float64, extents: Any) -> Float64:
    """Means of cells `floor(i X / Y) .. ceil((i + 1) X / Y) - 1`."""
    out = np.zeros((len(x), *extents, x.shape[-1]))
    for place in places(extents):
        cell = tuple(
            slice(p * m // y, -(-(p + 1) * m // y)) for p, m, y in zip(place, x.shape[1:-1], extents, strict=True)
        )
        out[(slice(None), *place)] = x[(slice(None), *cell)].mean(axis=tuple(range(1, x.ndim - 1)))
    return out


def group_mask(extents: Any, size: Any, interval: Any = 1) -> NDArray[np.bool_]:
    """Which places are of one group of `partition`, `[places, places]`."""
    at = places(extents)
    steps = np.broadcast_to(np.array(interval), len(extents))
    ids = np.concatenate([at // (np.array(size) * steps), at % steps], axis=1)
    same: NDArray[np.bool_] = (ids[:, None] == ids[None]).all(axis=-1)
    return same


def inner_places(extents: Any, size: Any, interval: Any = 1) -> NDArray[np.int64]:
    """Number of each place in its group, `[places]`, the last axis fastest."""
    steps = np.broadcast_to(np.array(interval), len(extents))
    inner = places(extents) // steps % np.array(size)
    numbers: NDArray[np.int64] = np.ravel_multi_index(tuple(inner.T), tuple(size))
    return numbers
