"""Example masks: which keys a method's queries see, as small pictures on the methods' pages.

A method's entry makes its mask from example vectors by calling the method itself: with the identity as values, outputs
are weights, and keys of weight 0 are not seen. Where outputs are no weighted sums of values, keys are changed one at a
time, and those that change nothing are not seen. Pictures hold the mask's digest, so that an outdated one is found
without drawing.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

#: Side of a picture in pixels, about.
_SIDE = 384
#: Colours of what is seen, and of what is not.
_COLOURS = b"\xf2\xf2\xf2\x1f\x4e\x79"


@cache
def example(length: int = 128, *, heads: int = 1, dim: int = 32) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Queries and keys `[1, heads, length, dim]` of a text in passages on a few subjects, whose start all look at."""
    rng = np.random.default_rng(0)
    subjects = 1.5 * rng.standard_normal((5, dim))
    start = 1.2 * rng.standard_normal(dim)
    passage = rng.integers(0, len(subjects), -(-length // 8)).repeat(8)[:length]
    q = subjects[passage] + start + 0.6 * rng.standard_normal((heads, length, dim))
    k = subjects[passage] + 0.6 * rng.standard_normal((heads, length, dim))
    k[:, :2] += start
    made = q[None].astype(np.float32), k[None].astype(np.float32)
    for x in made:
        x.flags.writeable = False
    return made


def seen(attend: Callable[..., Any], *arguments: Any, shape: tuple[int, ...] | None = None, **options: Any) -> Mask:
    """What queries see of the keys: where `attend(q, k, v, ...)` gives other than 0 for the identity as values.

    Args:
        attend: the method.
        arguments: queries and keys `[1, 1, L, D]`, and what comes after the values.
        shape: the grid of `L` places that queries, keys and values lie on; `None` is a line.
        options: of the method.
    """
    q, k, *others = arguments
    v = np.eye(k.shape[2], dtype=np.float32)[None, None]
    if shape is not None:
        q, k, v = (x.reshape(1, 1, *shape, x.shape[-1]) for x in (q, k, v))
    out = np.asarray(attend(q, k, v, *others, **options))
    mask: Mask = out.reshape(-1, v.shape[-1]) != 0
    return mask


def causally(mask: Mask) -> Mask:
    """What causality leaves of a mask of the first batch entry and head, `[B, H, L, L]`."""
    return np.tril(mask[0, 0])


def kept_pairs(kept: NDArray[np.int64], tokens: int) -> Mask:
    """What layers after tokens have gone still compute of `tokens` by `tokens` pairs."""
    stays = np.isin(np.arange(tokens), kept)
    mask: Mask = stays & stays[:, None]
    return mask


def layer_seen(layer: Callable[..., Any], shape: tuple[int, ...], *, projections: int = 3, **options: Any) -> Mask:
    """As `seen`, of a layer of one head `layer(x, wq, wk, wv, ...)` over a grid, whose features are the identity.

    Outputs have as many features as the grid, and places of their own.
    """
    n = int(np.prod(shape))
    rng = np.random.default_rng(0)
    weights = [0.3 * rng.standard_normal((n, n), dtype=np.float32) for _ in range(projections - 1)]
    out = np.asarray(layer(np.eye(n, dtype=np.float32).reshape(1, *shape, n), *weights, np.eye(n), **options))
    mask: Mask = out.reshape(-1, n) != 0
    return mask


def changed(layer: Callable[..., Any], tokens: int, *, channels: int = 4) -> Mask:
    """Which tokens the rows of `layer(x)` change with, where outputs are no sums of weighted values.

    Args:
        layer: makes `[outputs, ...]` of rows `[tokens, channels]`; what a token has no part in keeps its bits.
        tokens: how many; they are exchanged for others one at a time, so that norms do not hide the change.
        channels: numbers of each.
    """
    x, others = np.random.default_rng(0).standard_normal((2, tokens, channels), dtype=np.float32)
    before = np.asarray(layer(x))
    own = np.eye(tokens, dtype=bool)[..., None]
    after = np.stack([np.asarray(layer(np.where(row, others, x))) for row in own], axis=1)
    mask: Mask = (after != before[:, None]).reshape(len(before), tokens, -1).any(axis=2)
    return mask


def digest(mask: Mask) -> str:
    """What tells masks apart."""
    return hashlib.sha256(f"{mask.shape}".encode() + np.packbits(mask).tobytes()).hexdigest()[:32]


def png(mask: Mask) -> bytes:
    """The mask as a picture, queries from the top down, with its digest as a comment."""
    zoom = max(1, _SIDE // max(mask.shape))
    pixels = mask.repeat(zoom, axis=0).repeat(zoom, axis=1)
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(pixels, axis=1))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0))
        + chunk(b"PLTE", _COLOURS)
        + chunk(b"tEXt", b"Comment\0" + digest(mask).encode())
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )
