"""Rows of small codes from their definition: what a `longattn.KVStore` of dtype "int8" or "int4" keeps.

A row is cut into groups of channels. Each group has an `offset`, its smallest number, and a `scale`, its range over
the largest code; `x = offset + scale * code`, the code rounded to nearest, halves up. Nothing is checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention as dense_attention

Float64 = NDArray[np.float64]


def encode(x: ArrayLike, bits: int, group_size: int | None = None) -> tuple[NDArray[np.uint8], Float64, Float64]:
    """Codes of rows.

    Args:
        x: rows `[..., dim]`.
        bits: bits of a code, 4 or 8.
        group_size: channels that share a scale; `None` is the whole row.

    Returns:
        Codes `[..., dim]` from 0 to `2 ** bits - 1`, scales and offsets `[..., groups]`. A group with a number that is
        not finite has the offset NaN.
    """
    x = np.asarray(x, np.float64)
    dim = x.shape[-1]
    group_size = dim if group_size is None else group_size
    largest = 2**bits - 1
    codes = np.zeros(x.shape, np.uint8)
    scales, offsets = (np.zeros((*x.shape[:-1], -(-dim // group_size))) for _ in range(2))
    for g, first in enumerate(range(0, dim, group_size)):
        group = x[..., first : first + group_size]
        finite = np.isfinite(group).all(axis=-1)
        group = np.where(finite[..., None], group, 0.0)
        low, high = group.min(axis=-1), group.max(axis=-1)
        scale = (high - low) / largest
        steps = (group - low[..., None]) / np.where(scale == 0, 1.0, scale)[..., None]
        codes[..., first : first + group_size] = np.floor(steps + 0.5)
        scales[..., g], offsets[..., g] = scale, np.where(finite, low, np.nan)
    return codes, scales, offsets


def decode(codes: ArrayLike, scales: ArrayLike, offsets: ArrayLike, group_size: int | None = None) -> Float64:
    """The numbers that codes stand for, `[..., dim]`; arguments as `encode` returns them."""
    codes, scales, offsets = (np.asarray(x, np.float64) for x in (codes, scales, offsets))
    dim = codes.shape[-1]
    group = np.arange(dim) // (dim if group_size is None else group_size)
    rows: Float64 = offsets[..., group] + scales[..., group] * codes
    return rows


def channel_scales(keys: ArrayLike) -> Float64:
    """What the channels of keys are divided by, `[kv_heads, dim]`, from the rows of the first append.

    The largest magnitude of each channel, NaN aside, within 1e-30 and 1e30; 1 for a channel of zeros or with an
    infinity.

    Args:
        keys: `[kv_heads, rows, dim]`.
    """
    largest: Float64 = np.fmax.reduce(np.abs(np.asarray(keys, np.float64)), axis=-2, initial=0.0)
    useful = (largest > 0) & np.isfinite(largest)
    return np.where(useful, np.clip(largest, 1e-30, 1e30), 1.0)


def coded(x: ArrayLike, bits: int, group_size: int | None = None, channels: ArrayLike | None = None) -> Float64:
    """Rows `[kv_heads, rows, dim]` after coding and decoding.

    Args:
        x: the rows.
        bits: as in `encode`.
        group_size: as in `encode`.
        channels: what channels are divided by before coding, `[kv_heads, dim]`; `None` is nothing.
    """
    factors = 1.0 if channels is None else np.asarray(channels, np.float64)[:, None]
    codes = encode(np.asarray(x, np.float64) / factors, bits, group_size)
    rows: Float64 = factors * decode(*codes, group_size)
    return rows


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    bits: int,
    group_size: int | None = None,
    channels: ArrayLike | None = None,
    **options: Any,
) -> Any:
    """Attention over keys and values that were coded: `longattn.attention` of the keys and values of such a store.

    Args:
        q: queries `[Hq, Lq, D]`.
        k: keys `[Hkv, Lk, D]` as they were appended.
        v: values `[Hkv, Lk, Dv]` likewise.
        bits: as in `encode`.
        group_size: as in `encode`.
        channels: of keys, as in `coded`.
        options: those of `longattn.attention`.

    Returns:
        As `longattn.reference.dense.attention`.
    """
    return dense_attention(q, coded(k, bits, group_size, channels), coded(v, bits, group_size), **options)
