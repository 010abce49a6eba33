"""Exact attention on a GPU: decode over splits of the keys, prefill by tiles, over all keys or over lists of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Unpack

import numpy as np

from longattn._score_options import PackedScoreOptions, ScoreOptions, check_names
from longattn.gpu._checks import (
    MOST_ACROSS,
    attention_views,
    check_blocks,
    check_fit,
    check_listed,
    check_shared,
    heads_view,
    packed_view,
    sequence_ends,
)
from longattn.gpu._device import KERNEL_DTYPES, Device, Launch, View, device_of
from longattn.gpu._scores import Scores, scores_of
from longattn.gpu._sources import with_options
from longattn.gpu.coded_rows import CodedRows, coded_views
from longattn.gpu.merge import merge_splits

#: Rows of a KV head (query heads times positions) up to which keys are split over blocks instead of rows.
DECODE_ROWS = 16
#: Keys of a tile of a prefill, and of a block in its lists.
BLOCK_KEYS = 64

_DECODE_THREADS = 128
_PREFILL_THREADS = 128
_WIDE = 128  # wider rows have two stages of copies
_DECODE_STAGES = 3
_CODED_STAGES = 4
_SPLIT_MULTIPLE = 64
_SPLIT_LEAST = 256


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    state: tuple[Any, Any] | None = None,
    return_lse: bool = False,
    out_dtype: str | None = None,
    device: Device | None = None,
    **options: Unpack[ScoreOptions],
) -> Any:
    """Softmax attention on a GPU, as `longattn.attention`.

    Args:
        q: queries `[B, Hq, Lq, D]`, a CuPy array or a torch CUDA tensor; float32, float16 or bfloat16; D is 64, 128
            or 256.
        k: keys `[B, Hkv, Lk, D]`, dtype of `q`; or `CodedRows` for float16 or bfloat16 queries. More than 16 query rows
            per KV head read them as numbers of that dtype.
        v: values, the shape of `k`; `CodedRows` where the keys are.
        state: pair `(o, lse)` of an earlier part over other keys, float32 `[B, Hq, Lq, D]` and `[B, Hq, Lq]`, which
            enters the softmax. Rows with an lse of -inf count as nothing, whatever their `o` holds.
        return_lse: also return the log-sum-exp `[B, Hq, Lq]`, float32, natural log, sinks and state included.
        out_dtype: dtype of the output, "float32" for a part that is merged later; `None` is that of `q`, and the only
            one for more than 16 rows per KV head.
        device: the back end; `None` is that of `q`.
        options: `causal`, `window`, `scale`, `softcap`, `bias`, `mask`, `alibi_slopes`, `sinks`, `relative_bias`,
            `relative_zero`, `segments` and `visible_until`, which mean what they mean there. Arrays are on the device:
            `mask` bool, `segments` and `visible_until` int32, the others, one for `scale` among them, float32; `bias`
            and `mask` by any strides.

    Returns:
        `out` in the kind and shape of `q`, or `(out, lse)`. A row that sees no key gives 0 and -inf where there are
        neither sinks nor a state.
        NaN and infinities in visible keys and values propagate, those in masked ones do not.

    Raises:
        TypeError: arrays of no GPU, or another dtype.
        ValueError: shapes that do not fit, another head size, a number out of range.
        ImportError: CuPy is not installed.

    Cost: with at most 16 rows per KV head one pass over the keys and values that any row sees, split over blocks; else
        `Lq * Lk * D * 2` multiply-adds per head, less what causality and window leave out. Options of the scores
        have kernels of their own, compiled when first used; without them they cost nothing. Rows that are not aligned
        to 16 bytes cost one copy. Rows whose output is not finite are computed a second time, key by key.
    """
    device = device or device_of(q, "q")
    coded = _is_coded(k, v)
    queries, keys, values = _coded(device, q, k, v) if coded else attention_views(device, q, k, v)
    rows, length = queries.shape[2], keys.shape[2]
    scores, ends = scores_of(device, queries.shape, length, state=state, **options)
    split = queries.shape[1] // keys.shape[1] * rows <= DECODE_ROWS and length > 0
    if out_dtype not in ((None, *KERNEL_DTYPES) if split else (None, queries.dtype)):
        raise ValueError(f"out_dtype: got {out_dtype!r}, expected {queries.dtype} for these shapes")
    out, lse, results = _results(device, queries, out_dtype or queries.dtype)
    if math.prod(queries.shape) == 0:
        return (out, lse) if return_lse else out
    if split:
        first = max(length - rows - ends[0], 0) if ends[0] >= 0 else 0
        parameters = None
        if first and not coded:  # what no row sees is not read
            keys, values = (device.view(x.owner[:, :, first:], "k") for x in (keys, values))
        if coded:
            (keys, of_keys), (values, of_values) = (coded_views(device, x.from_row(first), "k") for x in (k, v))
            parameters = of_keys, of_values
        ends = (-1 if rows == 1 else ends[0]), ends[1]
        _decode(device, queries, keys, values, results, scores.from_key(device, first), ends, parameters=parameters)
    else:
        parameters = _parameters(device, k, v) if coded else None
        _prefill(device, queries, keys, values, results, scores, ends, parameters=parameters)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    state: tuple[Any, Any] | None = None,
    return_lse: bool = False,
    device: Device | None = None,
    **options: Unpack[PackedScoreOptions],
) -> Any:
    """Attention over packed sequences of different lengths on a GPU, as `longattn.attention_varlen`.

    Args:
        q: queries `[Tq, Hq, D]`, otherwise as of `attention`.
        k: keys `[Tk, Hkv, D]`.
        v: values, the shape of `k`.
        cu_seqlens_q: integers `[sequences + 1]`, where each sequence's rows begin, and their end; on the host, or on
            the device, from where they are copied, which waits for it.
        cu_seqlens_k: the same for keys.
        state: as of `attention`: `o` `[Tq, Hq, D]`, `lse` `[Hq, Tq]`.
        return_lse: also return the log-sum-exp `[Hq, Tq]`.
        device: as of `attention`.
        options: `causal`, `window`, `scale`, `softcap`, `alibi_slopes`, `sinks`, `relative_bias` and `relative_zero` of
            `attention`, inside each sequence; arrays for `scale` and `alibi_slopes` are `[Hq]`.

    Returns:
        The output `[Tq, Hq, D]` in the kind and dtype of `q`, or the pair with the log-sum-exp.

    Raises:
        TypeError: as of `attention`.
        ValueError: as of `attention`; bounds that do not fit the arrays.

    Cost: that of `attention` summed over the sequences; short sequences go through blocks of 64 rows or more.
    """
    device = device or device_of(q, "q")
    queries, keys, values = attention_views(device, q, k, v, of=packed_view)
    _, heads, total, dim = queries.shape
    q_ends = sequence_ends(device, cu_seqlens_q, "cu_seqlens_q", total)
    k_ends = sequence_ends(device, cu_seqlens_k, "cu_seqlens_k", keys.shape[2])
    if len(q_ends) != len(k_ends):
        raise ValueError(f"cu_seqlens_k: got {len(k_ends) - 1} sequences, expected {len(q_ends) - 1}")
    if len(q_ends) - 1 > MOST_ACROSS:
        raise ValueError(f"cu_seqlens_q: got {len(q_ends) - 1} sequences, expected at most {MOST_ACROSS} on a GPU")
    check_names(options, PackedScoreOptions)
    scale: Any = options.get("scale")
    slopes = options.get("alibi_slopes")
    if hasattr(scale, "shape") and len(scale.shape) > 1:
        raise ValueError(f"scale: got shape {tuple(scale.shape)}, expected ({heads},)")
    if slopes is not None and len(slopes.shape) != 1:
        raise ValueError(f"alibi_slopes: got shape {tuple(slopes.shape)}, expected ({heads},)")
    scores, ends = scores_of(
        device, queries.shape, keys.shape[2], state=state, out_shape=(total, heads, dim), **options
    )
    out = device.empty((total, heads, dim), queries.dtype, q)
    lse = device.empty((heads, total), "float32", q)
    if math.prod(queries.shape):
        whole = device.view(out, "out")
        to = replace(whole, shape=queries.shape, strides=(0, dim, heads * dim, 1))
        q_bounds, k_bounds = (device.view(device.integers(x, q), "cu_seqlens") for x in (q_ends, k_ends))
        packed = q_bounds, k_bounds, int(np.diff(q_ends).max(initial=0))
        _prefill(device, queries, keys, values, (to, device.view(lse, "lse")), scores, ends, packed=packed)
    return (out, lse) if return_lse else out


def index_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    rows: Any,
    lengths: Any | None = None,
    *,
    scale: Any = None,
    softcap: float = 0.0,
    sinks: Any = None,
    state: tuple[Any, Any] | None = None,
    check: bool = False,
    return_lse: bool = False,
    device: Device | None = None,
) -> Any:
    """Attention of a decode step over chosen rows of the keys, read where they lie.

    Args:
        q: queries `[B, Hq, Lq, D]`, as of `attention`, with at most 16 rows per KV head.
        k: keys `[B, Hkv, Lk, D]`, or `CodedRows`, as of `attention`; memory of the host that the device can address
            serves as well.
        v: values, the shape of `k`; `CodedRows` where the keys are.
        rows: integers `[B, Hkv, n]`, each in `0 .. Lk`, a list that all rows of the KV head share; on the host or on
            the device.
        lengths: integers `[B]` or `[B, Hkv]`, how many entries of the lists count; `None` counts all.
        scale: as of `attention`.
        softcap: as of `attention`.
        sinks: as of `attention`.
        state: as of `attention`.
        check: look at lists that lie on the device too before the kernel does, which waits for them.
        return_lse: as of `attention`.
        device: as of `attention`.

    Returns:
        As of `attention`. An empty list gives 0 and -inf where there are neither sinks nor a state.

    Raises:
        TypeError: as of `attention`.
        ValueError: as of `attention`; too many query rows; lists of another shape; rows that are not there, in lists
            on the host, or with `check` anywhere. Without it, one out of range in a list on the device is an access
            out of bounds.

    Cost: one pass over the chosen rows.
    """
    device = device or device_of(q, "q")
    coded = _is_coded(k, v)
    queries, keys, values = _coded(device, q, k, v) if coded else attention_views(device, q, k, v)
    batch, heads, positions = queries.shape[:3]
    kv_heads = keys.shape[1]
    if heads // kv_heads * positions > DECODE_ROWS:
        raise ValueError(f"q: got {heads // kv_heads * positions} rows per KV head, expected at most {DECODE_ROWS}")
    check_listed(device, rows, lengths, (batch, kv_heads), keys.shape[2], check=check)
    scores, _ = scores_of(device, queries.shape, keys.shape[2], scale=scale, softcap=softcap, sinks=sinks, state=state)
    listed = device.view(device.integers(rows, q), "rows")
    counts = None
    if lengths is not None:
        counts = device.view(device.integers(lengths, q), "lengths")
        counts = replace(counts, strides=(*counts.strides, 0)[:2])  # a stride of 0: the same for all heads
    out, lse, results = _results(device, queries, queries.dtype)
    parameters = _parameters(device, k, v) if coded else None
    if math.prod(queries.shape):
        ends = -1, -1
        _decode(
            device, queries, keys, values, results, scores, ends, listed=listed, lengths=counts, parameters=parameters
        )
    return (out, lse) if return_lse else out


def block_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    starts: Any,
    blocks: Any,
    *,
    query_block: int = 64,
    state: tuple[Any, Any] | None = None,
    check: bool = False,
    return_lse: bool = False,
    device: Device | None = None,
    **options: Unpack[ScoreOptions],
) -> Any:
    """Attention over listed blocks of 64 keys for each block of query rows.

    Args:
        q: queries `[B, Hq, Lq, D]`, as of `attention`.
        k: keys `[B, Hkv, Lk, D]`, or `CodedRows`, as of `attention`.
        v: values, the shape of `k`; `CodedRows` where the keys are.
        starts: integers `[B, Hq, query blocks + 1]`: query block `i` reads `blocks[starts[i] : starts[i + 1]]`; on the
            host or on the device.
        blocks: integers `[n]`, ascending within a list.
        query_block: rows of a query block: 64, or without options of the scores 128 (16-bit dtypes with head sizes up
            to 128 only).
        state: as of `attention`.
        check: look at lists that lie on the device too before the kernel does, which waits for them.
        return_lse: as of `attention`.
        device: as of `attention`.
        options: as of `attention`, inside the listed blocks too. All but `causal`, `window` and a number for `scale`
            are options of the scores, and so is `state`.

    Returns:
        As of `attention`; rows of a block without a list give 0 and -inf where there are neither sinks nor a state.

    Raises:
        TypeError: as of `attention`.
        ValueError: as of `attention`; starts of another shape; a query block that no kernel has; blocks that are not
            there, in lists on the host, or with `check` anywhere.

    Cost: in proportion to the listed blocks.
    """
    device = device or device_of(q, "q")
    coded = _is_coded(k, v)
    queries, keys, values = _coded(device, q, k, v) if coded else attention_views(device, q, k, v)
    batch, heads, length = queries.shape[:3]
    scores, ends = scores_of(device, queries.shape, keys.shape[2], state=state, **options)
    offered = _prefill_rows(queries) if scores.plain else (64,)
    if query_block not in offered:
        with_what = "" if scores.plain else " with options of the scores"
        raise ValueError(f"query_block: got {query_block}{with_what}, expected one of {offered}")
    check_blocks(
        device,
        starts,
        blocks,
        (batch, heads, -(-length // query_block) + 1),
        -(-keys.shape[2] // BLOCK_KEYS),
        check=check,
    )
    out, lse, results = _results(device, queries, queries.dtype)
    if math.prod(queries.shape):
        lists = device.view(device.integers(starts, q), "starts"), device.view(device.integers(blocks, q), "blocks")
        _prefill(
            device,
            queries,
            keys,
            values,
            results,
            scores,
            ends,
            lists=lists,
            query_block=query_block,
            parameters=_parameters(device, k, v) if coded else None,
        )
    return (out, lse) if return_lse else out


def _is_coded(k: Any, v: Any) -> bool:
    return isinstance(k, CodedRows) or isinstance(v, CodedRows)


def _coded(device: Device, q: Any, k: Any, v: Any) -> tuple[View, View, View]:
    """Queries, and codes of keys and values, that fit each other."""
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, CodedRows):
            raise TypeError(f"{name}: got {type(x).__name__}, expected CodedRows, as the other of k and v is")
    queries = heads_view(device, q, "q")
    if queries.dtype == "float32":
        raise TypeError("q: got dtype float32 over coded keys, expected float16 or bfloat16")
    (keys, _), (values, _) = coded_views(device, k, "k"), coded_views(device, v, "v")
    check_fit(queries, keys.shape, values.shape)
    return queries, keys, values


def _parameters(device: Device, k: CodedRows, v: CodedRows) -> tuple[View, View]:
    """Scales and offsets of codes."""
    return coded_views(device, k, "k")[1], coded_views(device, v, "v")[1]


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
    scores: Scores,
    ends: tuple[int, int],
    *,
    listed: View | None = None,
    lengths: View | None = None,
    parameters: tuple[View, View] | None = None,
) -> None:
    """Splits of the keys into partial results, then their merge."""
    batch, heads, positions, dim = q.shape
    kv_heads = k.shape[1]
    rows = heads // kv_heads * positions
    most = k.shape[2] if listed is None else listed.shape[2]
    plain = scores.plain and ends[0] < 0
    if q.dtype == "float32":
        block_rows = 1 if rows == 1 and plain else 4
        name = f"decode_f32_{dim}_{block_rows}"
        parts = _DECODE_THREADS // min(dim // 4, 32)
        shared = 4 * block_rows * parts * (2 + dim)
    else:
        block_rows = DECODE_ROWS
        name = f"decode_{KERNEL_DTYPES[q.dtype]}_{dim}"
        stages, row_bytes = _DECODE_STAGES, 2 * dim
        if parameters is not None:
            name, stages, row_bytes = f"decode_int8_{KERNEL_DTYPES[q.dtype]}_{dim}", _CODED_STAGES, dim + 8
        tiles = 4 * (2 if dim > _WIDE else stages) * 2 * 16 * row_bytes  # keys and values of four warps
        shared = max(tiles, 4 * 16 * 4 * (2 + dim))
    check_shared(device, q, "q", shared)
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
        *(np.int32(n) for n in ((0, 0) if lengths is None else lengths.strides)),
        *(np.int32(n) for n in (most, split, rows, positions, *ends)),
        np.float32(scores.factor),
        *scores.arguments(),
    )
    arguments += _of_parameters(parameters)
    grid = (splits, kv_heads * -(-rows // block_rows), batch)
    source = "decode" if parameters is None else "decode_int8"
    source = source if plain else with_options(source)
    device.kernel(source, name)(grid, (_DECODE_THREADS,), arguments, shared)
    merge_splits(device, partial, partial_lse, *results)


def _of_parameters(parameters: tuple[View, View] | None) -> tuple[Any, ...]:
    """Arguments of scales and offsets: where they lie, and strides of batch and head."""
    views = parameters or ()
    return tuple(x for view in views for x in (view.pointer, *(np.int64(stride) for stride in view.strides[:2])))


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
    scores: Scores,
    ends: tuple[int, int],
    *,
    lists: tuple[View, View] | None = None,
    query_block: int | None = None,
    packed: tuple[View, View, int] | None = None,
    parameters: tuple[View, View] | None = None,
) -> None:
    """Blocks of query rows over tiles of keys; `packed`: where sequences begin, and the rows of the longest.

    `parameters`: scales and offsets, where keys and values are codes.
    """
    out, lse = results
    batch, heads, length, _ = q.shape
    rows = query_block or (max(_prefill_rows(q)) if scores.plain else 64)
    coded = parameters is not None
    kernel, threads, shared = prefill_launch(device, "prefill", q, rows, options=not scores.plain, coded=coded)
    arguments = (
        q.pointer,
        k.pointer,
        v.pointer,
        out.pointer,
        lse.pointer,
        *((None, None) if lists is None else (view.pointer for view in lists)),
        *((None, None) if packed is None else (view.pointer for view in packed[:2])),
        *_strides(q, k, v, out),
        *(np.int32(n) for n in (heads // k.shape[1], length, k.shape[2], *ends)),
        np.float32(scores.factor),
        *scores.arguments(),
        *_of_parameters(parameters),
    )
    sequences, longest = (batch, length) if packed is None else (packed[0].shape[0] - 1, packed[2])
    kernel((-(-longest // rows), heads, sequences), (threads,), arguments, shared)


def prefill_launch(
    device: Device, source: str, q: View, rows: int, *, options: bool, coded: bool = False
) -> tuple[Launch, int, int]:
    """The kernel of a source for these queries in blocks of so many rows, its threads, and its bytes of shared memory.

    `coded`: keys and values are codes.

    Raises:
        ValueError: more shared memory than the device has.
    """
    dim = q.shape[-1]
    if q.dtype == "float32":
        source = f"{source}_f32"
        name, shared = f"{source}_{dim}", 4 * ((64 + 32 + 32) * (dim + 4) + 64 * (32 + 4))
    else:
        source = f"{source}_int8" if coded else source
        name = f"{source}_{KERNEL_DTYPES[q.dtype]}_{dim}_{rows}"
        # A tile for keys and one for values; or one for both, and one of codes with their scales and offsets.
        shared = 2 * dim * rows + BLOCK_KEYS * (dim * 2 + dim + 8 if coded else 4 * dim)
    check_shared(device, q, "q", shared)
    return device.kernel(with_options(source) if options else source, name), _PREFILL_THREADS, shared
