"""Checks of what callers pass to attention functions, shared by every family.

Each error names the argument, what came and what was expected.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn._arrays import BFLOAT16, FLOAT64, FLOATS, Array, CodedRows, as_numpy, as_output, like

_T = TypeVar("_T")

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)
_LARGEST_SIZE = int(np.iinfo(np.intp).max)


def arithmetic(qn: NDArray[Any]) -> np.dtype[Any]:
    """The dtype that attention of the queries `qn` computes in."""
    return FLOAT64 if qn.dtype == FLOAT64 else np.dtype(np.float32)


def dense_inputs(
    q: Array, k: Array, v: Array, *, codes: bool = False, double: bool = True
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Queries, keys and values `[B, H, L, D]` or `[H, L, D]` that fit each other; flags as in `attention_inputs`."""
    qn, kn, vn = attention_inputs(q, k, v, ranks=(3, 4), codes=codes, double=double)
    for x, name in ((kn, "k"), (vn, "v")):
        if x.shape[:-3] != qn.shape[:-3]:
            raise ValueError(f"{name}: got batch {x.shape[0]}, expected {qn.shape[0]} as in q")
    check_heads(qn.shape[-3], kn.shape[-3], vn.shape[-3])
    if vn.shape[-2] != kn.shape[-2]:
        raise ValueError(f"v: got length {vn.shape[-2]}, expected {kn.shape[-2]} as in k")
    return qn, kn, vn


def packed_inputs(
    q: Array, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Packed queries, keys and values `[T, H, D]` that fit each other, and the bounds of their sequences."""
    qn, kn, vn = attention_inputs(q, k, v, ranks=(3,))
    check_heads(qn.shape[1], kn.shape[1], vn.shape[1])
    if vn.shape[0] != kn.shape[0]:
        raise ValueError(f"v: got length {vn.shape[0]}, expected {kn.shape[0]} as in k")
    cu_q = sequence_bounds(cu_seqlens_q, "cu_seqlens_q", qn.shape[0])
    cu_k = sequence_bounds(cu_seqlens_k, "cu_seqlens_k", kn.shape[0])
    if len(cu_k) != len(cu_q):
        raise ValueError(f"cu_seqlens_k: got {len(cu_k) - 1} sequences, expected {len(cu_q) - 1} as in cu_seqlens_q")
    return qn, kn, vn, cu_q, cu_k


def attention_inputs(
    q: Array, k: Array, v: Array, *, ranks: tuple[int, ...], codes: bool = False, double: bool = False
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Queries, keys and values as numpy arrays of fitting rank, dtype and head_dim.

    With `codes`, keys and values may also be rows of codes, which look like arrays as far as checks go; with
    `double`, all three may be float64.
    """
    qn = as_numpy(q, "q")
    kn, vn = (
        cast(Any, x) if codes and isinstance(x, CodedRows) else as_numpy(x, name) for x, name in ((k, "k"), (v, "v"))
    )
    if qn.ndim not in ranks:
        raise ValueError(f"q: got shape {qn.shape}, expected rank {' or '.join(map(str, ranks))}")
    for x, name in ((kn, "k"), (vn, "v")):
        if x.ndim != qn.ndim:
            raise ValueError(f"{name}: got shape {x.shape}, expected rank {qn.ndim} as q")
    all_double = double and all(x.dtype == FLOAT64 for x in (qn, kn, vn))
    for x, name in ((qn, "q"), (kn, "k"), (vn, "v")):
        if not all_double:
            check_float_storage(x, name, double)
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: got head_dim 0 in shape {x.shape}, expected at least 1")
    if vn.dtype != kn.dtype:
        raise TypeError(f"v: got dtype {vn.dtype}, expected {kn.dtype} as k")
    if kn.shape[-1] != qn.shape[-1]:
        raise ValueError(f"k: got head_dim {kn.shape[-1]}, expected {qn.shape[-1]} as in q")
    return qn, kn, vn


def shape_of(x: Array, name: str) -> tuple[int, ...]:
    """Shape of an argument that is only passed on: nothing is borrowed or copied where it says its shape itself."""
    return tuple(x.shape) if hasattr(x, "shape") else as_numpy(x, name, any_strides=True).shape


def check_float_storage(x: NDArray[Any], name: str, double: bool = False) -> None:
    """Whether a storage dtype came; `double`: where float64 would do, if it were everywhere."""
    if not isinstance(x, CodedRows) and x.dtype not in FLOATS:
        hint = ", or float64 for all of q, k and v" if double else ""
        raise TypeError(f"{name}: got dtype {x.dtype}, expected float32, float16 or bfloat16{hint}")


def check_floating(x: NDArray[Any], name: str) -> None:
    if x.dtype.kind != "f" and x.dtype != BFLOAT16:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected a floating dtype")


def check_heads(q_heads: int, k_heads: int, v_heads: int) -> None:
    if k_heads == 0 or q_heads == 0 or q_heads % k_heads:
        raise ValueError(f"q: got {q_heads} heads, expected a positive multiple of the {k_heads} heads of k")
    if v_heads != k_heads:
        raise ValueError(f"v: got {v_heads} heads, expected {k_heads} as in k")


def all_within(x: NDArray[Any], low: float, high: float) -> bool:
    """Whether no number is below `low`, above `high` or NaN."""
    if x.size > 64:
        with np.errstate(invalid="ignore"):
            return bool(x.min() >= low and x.max() <= high)  # NaN is neither
    few = x.ravel().tolist()  # a decode step's; numpy takes longer to begin than to compare them
    total = sum(few)
    return not few or (not math.isnan(total) and min(few) >= low and max(few) <= high)


def flag(value: object, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: got {value!r}, expected True or False")
    return bool(value)


def integer(value: object, name: str, low: int | None = None, high: int | None = None) -> int:
    """An integer of 64 bits, where given of at least `low` and at most `high`."""
    number = any_integer(value, name)
    if (low is not None and number < low) or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: got {number}, expected {expected}")
    if high is None and abs(number) > _LARGEST_SIZE:
        raise ValueError(f"{name}: got {number}, expected an integer of 64 bits")
    return number


def any_integer(value: object, name: str) -> int:
    """An integer of any size, as Python's own, which does not wrap around."""
    if type(value) is int:
        return value
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: got {value!r}, expected an integer")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, expected an integer") from None


def real(value: object, name: str) -> float:
    """A number; NaN, with which every comparison fails, is none."""
    number = _number(value, name)
    if math.isnan(number):
        raise ValueError(f"{name}: got nan, expected a number")
    return number


def finite(value: object, name: str, low: float | None = None) -> float:
    """A number that float32 holds, where given of at least `low`."""
    number = _number(value, name)
    if not abs(number) <= _FLOAT32_MAX:  # NaN fails, too
        raise ValueError(f"{name}: got {value}, expected a finite float32")
    if low is not None and number < low:
        raise ValueError(f"{name}: got {value}, expected at least {low:g}")
    return number


def _number(value: object, name: str) -> float:
    if type(value) is float:
        return value
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: got a number beyond the range of float64, expected one within it") from None


def scale_factor(scale: object, dim: int, name: str = "scale") -> float:
    return float(dim**-0.5) if scale is None else finite(scale, name)


def items_of(value: Iterable[_T], name: str, of: str) -> tuple[_T, ...]:
    """The items of a sequence; `of` says what of, for the message."""
    single = isinstance(value, str | bytes | Mapping) or getattr(value, "shape", None) == ()
    if single or not isinstance(value, Iterable):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a sequence of {of}")
    return tuple(value)


def integers(value: Iterable[object], name: str, low: int | None = None, high: int | None = None) -> tuple[int, ...]:
    """Integers, each as of `integer`."""
    return tuple(integer(n, name, low, high) for n in items_of(value, name, "integers"))


def function(value: object, name: str) -> None:
    """Whether something that can be called came."""
    if not callable(value):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a function")


def one_of(value: _T, name: str, choices: Collection[_T]) -> _T:
    """One of a few names, or None where that is among them."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        *others, last = map(repr, choices)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return value


def row_scales(scale: Array, rows: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Factors of query rows as `[B, Hq, Lq, 1]`, from `[Hq]`, `[Hq, Lq]` or `[B, Hq, Lq]`."""
    x = as_numpy(scale, "scale", any_strides=True)
    check_floating(x, "scale")
    batch, heads, length = (math.prod(rows[:-2]), *rows[-2:])
    if x.shape not in ((heads,), (heads, length), (batch, heads, length)):
        raise ValueError(
            f"scale: got shape {x.shape}, expected {(heads,)}, {(heads, length)} or {(batch, heads, length)}"
        )
    with np.errstate(over="ignore"):
        factors: NDArray[Any] = x.astype(dtype, copy=False)
    if not np.isfinite(factors).all():
        raise ValueError(f"scale: got an array with numbers that are no finite {np.dtype(dtype)}, expected finite ones")
    if factors.ndim == 1:
        factors = factors[:, None]
    return np.broadcast_to(factors, (batch, heads, length))[..., None]


def softcap_value(softcap: object) -> float:
    number = real(softcap, "softcap")
    # Below the smallest normal float32 its reciprocal overflows.
    if number != 0 and not _FLOAT32_TINY <= number <= _FLOAT32_MAX:
        raise ValueError(f"softcap: got {softcap}, expected 0 (off) or a positive normal float32")
    return number


def window_sides(window: object, span: int) -> tuple[int, int]:
    """Both sides, -1 where a side reaches past a span of `span` positions in any case."""
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window: got {window!r}, expected a pair (left, right)")
    if any(isinstance(side, bool) for side in window):
        raise TypeError(f"window: got {window!r}, expected a pair of integers (left, right)")
    try:
        left, right = (operator.index(side) for side in window)
    except TypeError:
        raise TypeError(f"window: got {window!r}, expected a pair of integers (left, right)") from None
    if left < -1 or right < -1:
        raise ValueError(f"window: got {window!r}, expected sides of at least 0, or -1 for unbounded")
    return (-1 if left >= span else left), (-1 if right >= span else right)


def broadcast_scores(x: NDArray[Any], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        full = np.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(f"{name}: got shape {x.shape}, expected one that broadcasts to {shape}") from None
    return batched(full, 4)


def bias_scores(bias: Array, scores: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    x = as_numpy(bias, "bias", any_strides=True)
    check_floating(x, "bias")
    with np.errstate(over="ignore"):  # float64's lowest number, a common "masked", becomes -inf
        return broadcast_scores(x.astype(dtype, copy=False), "bias", scores)


def mask_scores(mask: Array, scores: tuple[int, ...], name: str = "mask") -> NDArray[np.bool_]:
    x = as_numpy(mask, name, any_strides=True)
    if x.dtype != np.bool_:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected bool (a mask to add goes to bias)")
    return broadcast_scores(x, name, scores)


def relative_table(table: Array, zero: object, heads: int, dtype: DTypeLike) -> tuple[NDArray[Any], int]:
    """The table `[Hq, n]` and the entry of distance 0."""
    x = as_numpy(table, "relative_bias")
    check_floating(x, "relative_bias")
    check_relative_shape(x.shape, heads)
    at = relative_entry(zero, x.shape[1])
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, dtype), at


def check_relative_shape(shape: tuple[int, ...], heads: int) -> None:
    if len(shape) != 2 or shape[0] != heads or shape[1] == 0:
        raise ValueError(f"relative_bias: got shape {shape}, expected ({heads}, n), one row per query head")


def relative_entry(zero: object, entries: int) -> int:
    """The entry of distance 0 in a table of so many."""
    if zero is None:
        return entries - 1
    at = integer(zero, "relative_zero")
    if not 0 <= at < entries:
        raise ValueError(f"relative_zero: got {at}, expected an entry of the table, 0 to {entries - 1}")
    return at


def int32_rows(values: Array, name: str, batch: int, length: int) -> NDArray[Any]:
    """Integers as contiguous `[B, length]`, from `[length]` or `[B, length]`."""
    x = as_numpy(values, name)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {x.dtype}, expected integers")
    if x.shape not in ((length,), (batch, length)):
        raise ValueError(f"{name}: got shape {x.shape}, expected {(length,)} or {(batch, length)}")
    return np.ascontiguousarray(np.broadcast_to(x, (batch, length)))


def segment_ids(segments: object, batch: int, rows: int, keys: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    if not isinstance(segments, tuple | list) or len(segments) != 2:
        raise TypeError(f"segments: got {type(segments).__name__}, expected a pair (q_segments, k_segments)")
    ids = []
    for values, name, length in ((segments[0], "segments[0]", rows), (segments[1], "segments[1]", keys)):
        x = int32_rows(values, name, batch, length)
        if x.dtype != np.int32:
            if x.size and (int(x.min()) < -(2**31) or int(x.max()) >= 2**31):
                raise ValueError(f"{name}: got numbers from {x.min()} to {x.max()}, expected them within int32")
            x = x.astype(np.int32)
        ids.append(x)
    return ids[0], ids[1]


def key_ends(visible_until: Array, batch: int, keys: int) -> NDArray[np.int32]:
    x = int32_rows(visible_until, "visible_until", batch, keys)
    if x.dtype == np.int32:
        return x
    # No position lies beyond int32, so neither does any end that matters.
    kept, own = np.iinfo(np.int32), np.iinfo(x.dtype)
    clipped: NDArray[Any] = np.clip(x, max(own.min, kept.min), min(own.max, kept.max))
    return clipped.astype(np.int32)


def skip_fraction(threshold: object) -> float:
    number = real(threshold, "skip_threshold")
    if number != 0 and not 0 <= float(np.float32(number)) < 1:
        raise ValueError(f"skip_threshold: got {threshold}, expected 0 (off) or a number below 1")
    return number


def carried_state(
    state: object, out_shape: tuple[int, ...], lse_shape: tuple[int, ...], dtype: DTypeLike = np.float32
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Output and log-sum-exp of an earlier part, in the shapes of this call's own."""
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"state: got {type(state).__name__}, expected a pair (o, lse)")
    o, lse = as_numpy(state[0], "state o"), as_numpy(state[1], "state lse")
    check_floating(o, "state o")
    check_floating(lse, "state lse")
    check_state_shapes(o.shape, lse.shape, out_shape, lse_shape)
    kept = o.dtype in FLOATS if dtype == np.float32 else o.dtype == dtype
    return (o if kept else o.astype(dtype)), np.ascontiguousarray(lse, dtype)


def check_state_shapes(
    o: tuple[int, ...], lse: tuple[int, ...], out_shape: tuple[int, ...], lse_shape: tuple[int, ...]
) -> None:
    if o != out_shape:
        raise ValueError(f"state o: got shape {o}, expected {out_shape} as the output")
    if lse != lse_shape:
        raise ValueError(f"state lse: got shape {lse}, expected {lse_shape}")


def slopes_per_head(alibi_slopes: Array, batch_heads: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Slopes as contiguous `[B, Hq]`."""
    x = as_numpy(alibi_slopes, "alibi_slopes")
    check_floating(x, "alibi_slopes")
    heads = batch_heads[-1]
    batch = math.prod(batch_heads[:-1])
    if x.shape not in ((heads,), (batch, heads)):
        raise ValueError(f"alibi_slopes: got shape {x.shape}, expected {(heads,)} or {(batch, heads)}")
    return np.ascontiguousarray(np.broadcast_to(x, (batch, heads)), dtype)


def per_head(values: Array, name: str, heads: int, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    x = as_numpy(values, name)
    check_floating(x, name)
    if x.shape != (heads,):
        raise ValueError(f"{name}: got shape {x.shape}, expected {(heads,)}, one per query head")
    return np.ascontiguousarray(x, dtype)


def sequence_bounds(cu_seqlens: Array, name: str, total: int) -> NDArray[np.int64]:
    x = as_numpy(cu_seqlens, name)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {x.dtype}, expected integers")
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name}: got shape {x.shape}, expected [sequences + 1]")
    bounds = np.ascontiguousarray(x, np.int64)
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(f"{name}: got bounds from {bounds[0]} to {bounds[-1]}, expected 0 to {total}")
    falls = np.flatnonzero(np.diff(bounds) < 0)
    if falls.size:
        at = int(falls[0])
        raise ValueError(
            f"{name}: got {bounds[at]}, then {bounds[at + 1]} at {at + 1}, expected bounds that never fall"
        )
    return bounds


def batched(x: NDArray[Any], rank: int) -> NDArray[Any]:
    """`x` with a batch axis of 1 in front where it has none; rows of codes as the compiled module knows them."""
    if isinstance(x, CodedRows):
        return cast(Any, x._handle)
    return x if x.ndim == rank else x[None]


def result_array(
    out: Array | None,
    q: Array,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    inputs: Mapping[str, NDArray[Any] | None],
) -> NDArray[Any]:
    """Where the result goes: the caller's `out`, or new memory."""
    if out is None:
        return np.empty(shape, dtype)
    return as_output(out, like=q, shape=shape, dtype=dtype, inputs=inputs)


def returned(out: Array | None, q: Array, result: NDArray[Any], lse: NDArray[Any] | None) -> Any:
    output = like(q, result) if out is None else out
    return output if lse is None else (output, like(q, lse))


def size(value: object, name: str, least: int = 1) -> int:
    number = any_integer(value, name)
    if not least <= number <= _LARGEST_SIZE:
        raise ValueError(f"{name}: got {number}, expected at least {least} and at most {_LARGEST_SIZE}")
    return number


def storage(dtype: DTypeLike) -> np.dtype[Any]:
    """A storage dtype of numbers, given by name or type."""
    try:
        found: np.dtype[Any] | None = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in FLOATS:
        raise TypeError(f"dtype: got {dtype!r}, expected float32, float16 or bfloat16")
    return found
