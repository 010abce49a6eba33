"""Top-k of keys by sign codes on a GPU: codes of keys and queries, a scan, and the rows that agree in most bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.gpu._checks import heads_view, is_aligned
from longattn.gpu._choice import ROWS, rows_above, threshold_step
from longattn.gpu._device import KERNEL_DTYPES, Device, device_of

#: Words of 32 bits that a code may have.
WORDS = (1, 2, 4, 8)

_THREADS = 256
_ALIGNMENT = 16  # of codes of 4 words and more, which are read in pieces
_MOST_BINS = 8192  # counts of a block, in shared memory


def hash_encode(x: Any, weights: Any, *, device: Device | None = None) -> Any:
    """Sign codes, bit `t` set where `(x @ weights)[t] > 0` (SimHash; HATA with learned weights).

    Args:
        x: keys or queries `[B, H, n, D]` on a GPU; float32, float16 or bfloat16; D 64, 128 or 256.
        weights: float32 `[H, D, bits]`, contiguous; 32, 64, 128 or 256 bits.
        device: the back end; `None` is that of `x`.

    Returns:
        Codes `[B, H, n, bits / 32]`, int32 whose bits count from the lowest.

    Raises:
        TypeError: arrays of no GPU, or another dtype.
        ValueError: shapes that do not fit, another number of bits.

    Cost: `n * D * bits` multiply-adds per head.
    """
    device = device or device_of(x, "x")
    view, matrix = heads_view(device, x, "x"), device.view(weights, "weights")
    batch, heads, rows, dim = view.shape
    if matrix.dtype != "float32" or matrix.shape[:2] != (heads, dim) or len(matrix.shape) != 3:
        raise ValueError(f"weights: got {matrix.dtype} {matrix.shape}, expected float32 [{heads}, {dim}, bits]")
    words, left = divmod(matrix.shape[2], 32)
    if left or words not in WORDS:
        raise ValueError(f"weights: got {matrix.shape[2]} bits, expected one of {tuple(32 * w for w in WORDS)}")
    matrix = device.view(device.contiguous(weights), "weights")
    codes = device.empty((batch, heads, rows, words), "int32", x)
    if batch * heads * rows:
        name = f"hash_encode_{KERNEL_DTYPES[view.dtype]}_{dim}"
        arguments = (
            view.pointer,
            matrix.pointer,
            device.view(codes, "codes").pointer,
            *(np.int64(stride) for stride in view.strides[:3]),
            np.int32(rows),
            np.int32(words),
        )
        device.kernel("hash", name)((-(-rows // (_THREADS // 32)), heads, batch), (_THREADS,), arguments, 0)
    return codes


def hash_topk(queries: Any, codes: Any, k: int, *, device: Device | None = None) -> Any:
    """The `k` rows whose codes agree with a group's queries in most bits.

    Args:
        queries: codes `[B, Hkv, G, words]` of a KV head's query heads, from `hash_encode`.
        codes: codes `[B, Hkv, n, words]` of the keys, contiguous rows.
        k: rows to choose, 1 to `n`.
        device: the back end; `None` is that of `codes`.

    Returns:
        int32 `[B, Hkv, k]`, ascending; among equal scores the lower rows. What `index_sparse_attention` takes.

    Raises:
        TypeError: arrays of no GPU, or another dtype.
        ValueError: shapes that do not fit, `k` out of range, more than 8,191 bits of a group together.

    Cost: one pass over the codes, two over scores of 16 bits, four launches.
    """
    device = device or device_of(codes, "codes")
    asked, kept = device.view(queries, "queries"), device.view(codes, "codes")
    for name, view in (("queries", asked), ("codes", kept)):
        if view.dtype != "int32" or len(view.shape) != 4 or view.shape[3] not in WORDS:
            raise ValueError(f"{name}: got {view.dtype} {view.shape}, expected int32 [B, Hkv, n, words of {WORDS}]")
    batch, heads, rows, words = kept.shape
    group = asked.shape[2]
    if asked.shape != (batch, heads, group, words):
        raise ValueError(f"queries: got shape {asked.shape}, expected [{batch}, {heads}, G, {words}]")
    if not 1 <= k <= rows:
        raise ValueError(f"k: got {k}, expected 1 to the {rows} rows of codes")
    bins = group * words * 32 + 1
    if bins > _MOST_BINS:
        raise ValueError(f"queries: got {bins - 1} bits in a group, expected at most {_MOST_BINS - 1}")
    if kept.strides[2:] != (words, 1) or (words % 4 == 0 and not is_aligned(kept, _ALIGNMENT)):
        kept = device.view(device.contiguous(codes), "codes")
    asked = device.view(device.contiguous(queries), "queries")
    if batch * heads == 0:
        return device.empty((batch, heads, k), "int32", codes)
    scores = device.view(device.empty((batch, heads, rows), "uint16", codes), "scores")
    counts = device.view(device.zeros((batch, heads, bins), "int32", codes), "counts")
    threshold = device.view(device.empty((batch, heads, 2), "int32", codes), "threshold")
    device.kernel("hash", f"hash_scan_{words}")(
        (-(-rows // ROWS), heads, batch),
        (_THREADS,),
        (
            asked.pointer,
            kept.pointer,
            scores.pointer,
            counts.pointer,
            np.int64(kept.strides[0]),
            np.int64(kept.strides[1]),
            *(np.int32(n) for n in (group, rows, bins)),
        ),
        4 * (group * words + bins),
    )
    threshold_step(device, "hash", "u16", counts, threshold, k)
    return rows_above(device, "hash", "u16", scores, threshold, k)
