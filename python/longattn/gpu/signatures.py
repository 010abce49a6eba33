"""Codes of 4 bits per dimension of keys on a GPU, in the format of `longattn.index.Signatures`, and top-k by them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from longattn._checks import integer, scale_factor
from longattn.gpu._checks import check_shared, heads_view, is_aligned
from longattn.gpu._choice import ROWS, rows_above, threshold_step
from longattn.gpu._device import KERNEL_DTYPES, Device, View, device_of
from longattn.reference.retrieval.signatures import rotation

#: Keys of a block of codes; an incomplete block has no code yet.
BLOCK = 16

_ENCODE_THREADS = 128
_THREADS = 256
_WORD = 4  # bytes of codes that are read at a time
_BINS = 2048
#: Bits of a score below those of the scan's histogram, and bins of each later one.
_LATER = ((10, 2048), (0, 1024))


@dataclass(frozen=True, slots=True)
class SignatureCodes:
    """Codes of keys on a device.

    Attributes:
        codes: uint8 `[B, Hkv, blocks, 8 D + 32]`: 16 keys in a block.
        centre: float32 `[B, Hkv, D]`, what was subtracted from the keys.
        turned: float32 `[D, D]`, the transpose of what they were multiplied by then.
    """

    codes: Any
    centre: Any
    turned: Any


def signatures_encode(
    keys: Any, *, seed: int = 0, fitted: SignatureCodes | None = None, device: Device | None = None
) -> SignatureCodes:
    """Codes of whole blocks of 16 keys, as `longattn.index.Signatures` makes them with 4 bits.

    Args:
        keys: `[B, Hkv, n, D]` on a GPU; float32, float16 or bfloat16; D is 64, 128 or 256. Rows beyond a multiple of
            16 get no code.
        seed: of the rotation; equal seeds and rows give the codes of the CPU, but for rounding.
        fitted: codes of earlier rows, whose centre and rotation are taken; `None` takes the mean of these keys.
        device: the back end; `None` is that of `keys`.

    Raises:
        TypeError: arrays of no GPU, or another dtype.
        ValueError: another rank or head size; fewer than 16 keys to fit on.

    Cost: `n * D * (D + 10)` multiply-adds per KV head; `D / 2 + 2` bytes per key and KV head.
    """
    device = device or device_of(keys, "keys")
    view = heads_view(device, keys, "keys")
    batch, heads, rows, dim = view.shape
    name = KERNEL_DTYPES[view.dtype]
    by = tuple(np.int64(stride) for stride in view.strides[:3])
    if fitted is None:
        if rows < BLOCK:
            raise ValueError(f"keys: got {rows} rows, expected at least {BLOCK} to fit on")
        host = np.ascontiguousarray(rotation(dim, integer(seed, "seed", 0)).T, np.float32)
        turned, centre = device.upload(host, keys), _mean(device, view, name, by)
    else:
        turned, centre = fitted.turned, fitted.centre
        if device.view(centre, "fitted").shape != (batch, heads, dim):
            raise ValueError(f"fitted: got a centre {device.view(centre, 'fitted').shape}, expected {view.shape[::3]}")
    blocks = rows // BLOCK
    codes = device.empty((batch, heads, blocks, 8 * dim + 2 * BLOCK), "uint8", keys)
    if batch * heads * blocks:
        arguments = (
            view.pointer,
            device.view(centre, "centre").pointer,
            device.view(turned, "turned").pointer,
            device.view(codes, "codes").pointer,
            *by,
        )
        launch = device.kernel("signatures", f"signatures_encode_{name}_{dim}")
        launch((blocks, heads, batch), (_ENCODE_THREADS,), arguments, 5 * BLOCK * dim)
    return SignatureCodes(codes, centre, turned)


def _mean(device: Device, keys: View, name: str, by: tuple[np.int64, ...]) -> Any:
    """The mean key of each head, `[B, H, D]`."""
    batch, heads, rows, dim = keys.shape
    blocks = -(-rows // ROWS)
    sums = device.view(device.empty((batch, heads, blocks, dim), "float32", keys.owner), "sums")
    centre = device.empty((batch, heads, dim), "float32", keys.owner)
    if batch * heads:
        sizes = np.int32(rows), np.int32(dim)
        device.kernel("signatures", f"signatures_sums_{name}")(
            (blocks, heads, batch), (dim,), (keys.pointer, sums.pointer, *by, *sizes), 0
        )
        device.kernel("signatures", "signatures_mean")(
            (batch * heads,), (dim,), (sums.pointer, device.view(centre, "centre").pointer, np.int32(blocks), *sizes), 0
        )
    return centre


def signatures_topk(
    queries: Any, signatures: SignatureCodes, k: int, *, scale: float | None = None, device: Device | None = None
) -> Any:
    """The `k` coded rows with the largest estimated logits.

    A row's score is the largest estimate among a group's queries, whose rotated numbers are rounded to signed bytes.

    Args:
        queries: `[B, Hkv, G, D]`, a KV head's query heads; float32, float16 or bfloat16.
        signatures: of the keys.
        k: rows to choose, 1 to the number of coded rows.
        scale: factor on the dot products; `None` is `D ** -0.5`. Only its sign changes the choice.
        device: the back end; `None` is that of `queries`.

    Returns:
        int32 `[B, Hkv, k]`, ascending; among equal scores the lower rows. What `index_sparse_attention` takes.

    Raises:
        TypeError: arrays of no GPU, or another dtype.
        ValueError: shapes that do not fit, `k` out of range.

    Cost: one pass over the codes for every 8 queries of a group, four over scores of 32 bits, nine launches.
    """
    device = device or device_of(queries, "queries")
    asked, codes = heads_view(device, queries, "queries"), device.view(signatures.codes, "signatures")
    batch, heads, group, dim = asked.shape
    if codes.shape[:2] != (batch, heads) or codes.shape[3] != 8 * dim + 2 * BLOCK:
        raise ValueError(f"queries: got shape {asked.shape}, which codes {codes.shape} do not fit")
    if group == 0:
        raise ValueError(f"queries: got shape {asked.shape}, expected at least one query per KV head")
    if codes.strides[2:] != (codes.shape[3], 1) or not is_aligned(codes, _WORD):
        raise ValueError(f"signatures: got codes by strides {codes.strides}, expected blocks that follow one another")
    rows = codes.shape[2] * BLOCK
    if not 1 <= k <= rows:
        raise ValueError(f"k: got {k}, expected 1 to the {rows} coded rows")
    if math.prod(asked.shape) == 0:
        return device.empty((batch, heads, k), "int32", queries)
    to_scan = 4 * (group * (dim // 4 + 3) + _BINS)
    check_shared(device, asked, "queries", to_scan)
    quads = device.view(device.empty((batch, heads, group, dim // 4), "int32", queries), "quads")
    numbers = device.view(device.empty((batch, heads, group, 3), "float32", queries), "numbers")
    device.kernel("signatures", f"signatures_prepare_{KERNEL_DTYPES[asked.dtype]}_{dim}")(
        (group, heads, batch),
        (dim,),
        (
            asked.pointer,
            device.view(signatures.centre, "centre").pointer,
            device.view(signatures.turned, "turned").pointer,
            quads.pointer,
            numbers.pointer,
            *(np.int64(stride) for stride in asked.strides[:3]),
            np.float32(scale_factor(scale, dim)),
        ),
        4 * (dim + 3 * dim // 32) + dim,
    )
    scores = device.view(device.empty((batch, heads, rows), "int32", queries), "scores")
    threshold = device.view(device.empty((batch, heads, 2), "int32", queries), "threshold")
    counts = _zeros(device, (batch, heads, _BINS), queries)
    blocks = -(-rows // ROWS)
    device.kernel("signatures", "signatures_scan")(
        (blocks, heads, batch),
        (_THREADS,),
        (
            quads.pointer,
            numbers.pointer,
            codes.pointer,
            scores.pointer,
            counts.pointer,
            np.int64(codes.strides[0]),
            np.int64(codes.strides[1]),
            *(np.int32(n) for n in (group, rows, dim)),
        ),
        to_scan,
    )
    threshold_step(device, "signatures", "u32", counts, threshold, k)
    for shift, bins in _LATER:
        counts = _zeros(device, (batch, heads, bins), queries)
        arguments = (scores.pointer, threshold.pointer, counts.pointer, *(np.int32(n) for n in (rows, shift, bins)))
        device.kernel("signatures", "signatures_histogram")((blocks, heads, batch), (_THREADS,), arguments, 4 * bins)
        threshold_step(device, "signatures", "u32", counts, threshold, -1)
    return rows_above(device, "signatures", "u32", scores, threshold, k)


def _zeros(device: Device, shape: tuple[int, ...], like: Any) -> View:
    return device.view(device.zeros(shape, "int32", like), "counts")
