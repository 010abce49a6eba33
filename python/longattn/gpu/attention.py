"""Exact attention on a GPU: decode over splits of the keys, prefill by tiles, over all keys or over lists of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from longattn.gpu._checks import attention_views, window_ends
from longattn.gpu._device import KERNEL_DTYPES, Device, View, device_of
from longattn.gpu.merge import merge_splits

#: Rows of a KV head (query heads times positions) up to which keys are split over blocks instead of rows.
DECODE_ROWS = 16
#: Keys of a tile of a prefill, and of a block in its lists.
BLOCK_KEYS = 64

_LOG2_E = math.log2(math.e)
_DECODE_THREADS = 128
_DECODE_STAGES = 3
_SPLIT_MULTIPLE = 64
_SPLIT_LEAST = 256


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    return_lse: bool = False,
    out_dtype: str | None = None,
    device: Device | None = None,
) -> Any:
    """Softmax attention on a GPU, as `longattn.attention`.

    Args:
        q: queries `[B, Hq, Lq, D]`, a CuPy array or a torch CUDA tensor; float32, float16 or bfloat16; D is 64, 128
            or 256.
        k: keys `[B, Hkv, Lk, D]`, dtype of `q`.
        v: values, the shape of `k`.
        causal: a query sees only keys at its own position and before; the last query is at the last key.
        window: `(left, right)`, -1 unbounded.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp `[B, Hq, Lq]`, float32, natural log.
        out_dtype: dtype of the output, "float32" for a part that is merged later; `None` is that of `q`, and the only
            one for more than 16 rows per KV head.
        device: the back end; `None` is that of `q`.

    Returns:
        `out` in the kind and shape of `q`, or `(out, lse)`. A row that sees no key gives 0 and -inf. Unlike on
        a CPU, a NaN in the values of a key that is masked, but in a tile that is not, spreads.

    Raises:
        TypeError: arrays of no GPU, or another dtype.
        ValueError: shapes that do not fit, another head size, a window end below -1.
        ImportError: CuPy is not installed.

    Cost: with at most 16 rows per KV head one pass over keys and values, split over blocks; else `Lq * Lk * D * 2`
        multiply-adds per head, less what causality and window leave out. Rows that are not aligned to 16 bytes cost
        one copy.
    """
    device = device or device_of(q, "q")
    queries, keys, values = attention_views(device, q, k, v)
    left, right = window_ends(causal, window)
    positions, kv_heads = queries.shape[2], keys.shape[1]
    few = queries.shape[1] // kv_heads * positions <= DECODE_ROWS
    split = few and left < 0 and right <= 0 and keys.shape[2] > 0
    if out_dtype not in ((None, *KERNEL_DTYPES) if split else (None, queries.dtype)):
        raise ValueError(f"out_dtype: got {out_dtype!r}, expected {queries.dtype} for these shapes")
    out, lse, results = _results(device, queries, out_dtype or queries.dtype)
    factor = _factor(scale, queries)
    if math.prod(queries.shape) == 0:
        return (out, lse) if return_lse else out
    if split:
        _decode(device, queries, keys, values, results, factor, causal=right == 0, listed=None, lengths=None)
    else:
        _prefill(device, queries, keys, values, results, factor, (left, right), None, None)
    return (out, lse) if return_lse else out


def index_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    rows: Any,
    lengths: Any | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    device: Device | None = None,
) -> Any:
    """Attention of a decode step over chosen rows of the keys, read where they lie.

    Args:
        q: queries `[B, Hq, Lq, D]`, as of `attention`, with at most 16 rows per KV head.
        k: keys `[B, Hkv, Lk, D]`; memory of the host that the device can address serves as well.
        v: values, the shape of `k`.
        rows: integers `[B, Hkv, n]`, each in `0 .. Lk`, a list that all rows of the KV head share.
        lengths: integers `[B]`, how many entries of the lists count; `None` counts all.
        scale: as of `attention`.
        return_lse: as of `attention`.
        device: as of `attention`.

    Returns:
        As of `attention`.

    Raises:
        TypeError: as of `attention`.
        ValueError: as of `attention`; too many query rows; lists of another shape. The entries themselves lie in the
            memory of the device and are not read before the kernel does: one out of range is an access out of bounds.

    Cost: one pass over the chosen rows.
    """
    device = device or device_of(q, "q")
    queries, keys, values = attention_views(device, q, k, v)
    batch, heads, positions = queries.shape[:3]
    kv_heads = keys.shape[1]
    if heads // kv_heads * positions > DECODE_ROWS:
        raise ValueError(f"q: got {heads // kv_heads * positions} rows per KV head, expected at most {DECODE_ROWS}")
    lists = device.integers(rows, q)
    listed = device.view(lists, "rows")
    if len(listed.shape) != 3 or listed.shape[:2] != (batch, kv_heads):
        raise ValueError(f"rows: got shape {listed.shape}, expected [{batch}, {kv_heads}, n]")
    counts = None if lengths is None else device.view(device.integers(lengths, q), "lengths")
    if counts is not None and counts.shape != (batch,):
        raise ValueError(f"lengths: got shape {counts.shape}, expected [{batch}]")
    out, lse, results = _results(device, queries, queries.dtype)
    factor = _factor(scale, queries)
    if math.prod(queries.shape):
        _decode(device, queries, keys, values, results, factor, causal=False, listed=listed, lengths=counts)
    return (out, lse) if return_lse else out


def block_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    starts: Any,
    blocks: Any,
    *,
    query_block: int = 64,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    return_lse: bool = False,
    device: Device | None = None,
) -> Any:
    """Attention over listed blocks of 64 keys for each block of query rows.

    Args:
        q: queries `[B, Hq, Lq, D]`, as of `attention`.
        k: keys `[B, Hkv, Lk, D]`.
        v: values, the shape of `k`.
        starts: integers `[B, Hq, query blocks + 1]`: query block `i` reads `blocks[starts[i] : starts[i + 1]]`.
        blocks: integers `[n]`, ascending within a list.
        query_block: rows of a query block: 64, or 128 (16-bit dtypes with head sizes up to 128 only).
        causal: as of `attention`, inside the listed blocks too.
        window: as of `attention`.
        scale: as of `attention`.
        return_lse: as of `attention`.
        device: as of `attention`.

    Returns:
        As of `attention`; rows of a block without a list give 0 and -inf.

    Raises:
        TypeError: as of `attention`.
        ValueError: as of `attention`; starts of another shape; a query block that no kernel has.

    Cost: in proportion to the listed blocks.
    """
    device = device or device_of(q, "q")
    queries, keys, values = attention_views(device, q, k, v)
    if query_block not in _prefill_rows(queries):
        raise ValueError(f"query_block: got {query_block}, expected one of {_prefill_rows(queries)}")
    batch, heads, length = queries.shape[:3]
    list_starts = device.view(device.integers(starts, q), "starts")
    expected = (batch, heads, -(-length // query_block) + 1)
    if list_starts.shape != expected:
        raise ValueError(f"starts: got shape {list_starts.shape}, expected {expected}")
    list_blocks = device.view(device.integers(blocks, q), "blocks")
    out, lse, results = _results(device, queries, queries.dtype)
    factor = _factor(scale, queries)
    if math.prod(queries.shape):
        ends = window_ends(causal, window)
        _prefill(device, queries, keys, values, results, factor, ends, (list_starts, list_blocks), query_block)
    return (out, lse) if return_lse else out


def _factor(scale: float | None, q: View) -> float:
    """Factor of the scores in units of log 2."""
    return (q.shape[3] ** -0.5 if scale is None else float(scale)) * _LOG2_E


def _results(device: Device, q: View, dtype: str) -> tuple[Any, Any, tuple[View, View]]:
    """New arrays for the output and its log-sum-exp, and their memory."""
    out, lse = device.empty(q.shape, dtype, q.owner), device.empty(q.shape[:3], "float32", q.owner)
    return out, lse, (device.view(out, "out"), device.view(lse, "lse"))


def _strides(*views: View) -> tuple[np.int64, ...]:
    return tuple(np.int64(stride) for view in views for stride in view.strides[:3])


def _decode(
    device: Device,
    q: View,
    k: View,
    v: View,
    results: tuple[View, View],
    factor: float,
    *,
    causal: bool,
    listed: View | None,
    lengths: View | None,
) -> None:
    """Splits of the keys into partial results, then their merge."""
    batch, heads, positions, dim = q.shape
    kv_heads = k.shape[1]
    rows = heads // kv_heads * positions
    most = k.shape[2] if listed is None else listed.shape[2]
    if q.dtype == "float32":
        block_rows = 1 if rows == 1 else 4
        name = f"decode_f32_{dim}_{block_rows}"
        parts = _DECODE_THREADS // min(dim // 4, 32)
        shared = 4 * block_rows * parts * (2 + dim)
    else:
        block_rows = DECODE_ROWS
        name = f"decode_{KERNEL_DTYPES[q.dtype]}_{dim}"
        tiles = 2 * 16 * dim * (1 + 4 * _DECODE_STAGES * 2)  # queries; keys and values of four warps
        shared = max(tiles, 4 * 16 * 4 * (2 + dim))
    across = batch * kv_heads * -(-rows // block_rows)
    split = _split_keys(most, across, device.processors)
    splits = max(1, -(-most // split))
    # The kernel takes the rows of a KV head as one axis: query heads of a group and positions follow one another.
    flat = q if q.strides == _contiguous(q.shape) else device.view(device.contiguous(q.owner), "q")
    partial = device.view(device.empty((batch, heads, positions, splits, dim), "float32", q.owner), "partial")
    partial_lse = device.view(device.empty((batch, heads, positions, splits), "float32", q.owner), "partial lse")
    arguments = (
        flat.pointer,
        k.pointer,
        v.pointer,
        None if listed is None else listed.pointer,
        None if lengths is None else lengths.pointer,
        partial.pointer,
        partial_lse.pointer,
        *_strides(k, v),
        *(np.int32(n) for n in (most, split, rows, positions)),
        np.float32(factor),
        np.int32(causal),
    )
    grid = (splits, kv_heads * -(-rows // block_rows), batch)
    device.kernel("decode", name)(grid, (_DECODE_THREADS,), arguments, shared)
    merge_splits(device, partial, partial_lse, *results)


def _split_keys(keys: int, across: int, processors: int) -> int:
    """Keys of a split: so many splits that every processor has two blocks, none shorter than is worth a block."""
    wanted = max(1, 2 * processors // max(across, 1))
    split = max(-(-keys // wanted), _SPLIT_LEAST)
    return -(-split // _SPLIT_MULTIPLE) * _SPLIT_MULTIPLE


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _prefill_rows(q: View) -> tuple[int, ...]:
    """Query rows that a block of a prefill kernel may have."""
    return (64,) if q.dtype == "float32" or q.shape[3] > 128 else (64, 128)


def _prefill(
    device: Device,
    q: View,
    k: View,
    v: View,
    results: tuple[View, View],
    factor: float,
    ends: tuple[int, int],
    lists: tuple[View, View] | None,
    query_block: int | None,
) -> None:
    """Blocks of query rows over tiles of keys."""
    out, lse = results
    batch, heads, length, dim = q.shape
    rows = query_block or max(_prefill_rows(q))
    if q.dtype == "float32":
        source, name, threads = "prefill_f32", f"prefill_f32_{dim}", 128
        shared = 4 * ((64 + 32 + 32) * (dim + 4) + 64 * (32 + 4))
    else:
        warps = rows // 16
        source, name, threads = "prefill", f"prefill_{KERNEL_DTYPES[q.dtype]}_{dim}_{warps}", 32 * warps
        shared = 2 * dim * (rows + 2 * BLOCK_KEYS)
    if shared > device.shared_limit:
        raise ValueError(
            f"q: got head_dim {dim} of {q.dtype}, which needs {shared} bytes of shared memory a block; this device has "
            f"{device.shared_limit}"
        )
    arguments = (
        q.pointer,
        k.pointer,
        v.pointer,
        out.pointer,
        lse.pointer,
        *((None, None) if lists is None else (view.pointer for view in lists)),
        *_strides(q, k, v, out),
        *(np.int32(n) for n in (heads // k.shape[1], length, k.shape[2], *ends)),
        np.float32(factor),
    )
    device.kernel(source, name)((-(-length // rows), heads, batch), (threads,), arguments, shared)
