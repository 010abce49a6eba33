"""Checks of what callers pass to attention functions, shared by every family.

Each error names the argument, what came and what was expected.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import BFLOAT16, FLOATS, Array, CodedRows, as_numpy, as_output, like

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)


def attention_inputs(
    q: Array, k: Array, v: Array, *, ranks: tuple[int, ...], codes: bool = False
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Queries, keys and values as numpy arrays of fitting rank, dtype and head_dim.

    With `codes`, keys and values may also be rows of codes, which look like arrays as far as checks go.
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
    for x, name in ((qn, "q"), (kn, "k"), (vn, "v")):
        check_float_storage(x, name)
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: got head_dim 0 in shape {x.shape}, expected at least 1")
    if vn.dtype != kn.dtype:
        raise TypeError(f"v: got dtype {vn.dtype}, expected {kn.dtype} as k")
    if kn.shape[-1] != qn.shape[-1]:
        raise ValueError(f"k: got head_dim {kn.shape[-1]}, expected {qn.shape[-1]} as in q")
    return qn, kn, vn


def check_float_storage(x: NDArray[Any], name: str) -> None:
    if not isinstance(x, CodedRows) and x.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected float32, float16 or bfloat16")


def check_floating(x: NDArray[Any], name: str) -> None:
    if x.dtype.kind != "f" and x.dtype != BFLOAT16:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected a floating dtype")


def check_heads(q_heads: int, k_heads: int, v_heads: int) -> None:
    if k_heads == 0 or q_heads == 0 or q_heads % k_heads:
        raise ValueError(f"q: got {q_heads} heads, expected a positive multiple of the {k_heads} heads of k")
    if v_heads != k_heads:
        raise ValueError(f"v: got {v_heads} heads, expected {k_heads} as in k")


def flag(value: object, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: got {value!r}, expected True or False")
    return bool(value)


def real(value: object, name: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    return float(value)


def scale_factor(scale: object, dim: int) -> float:
    if scale is None:
        return float(dim**-0.5)
    number = real(scale, "scale")
    if not abs(number) <= _FLOAT32_MAX:  # NaN fails, too
        raise ValueError(f"scale: got {scale}, expected a finite float32")
    return number


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


def bias_scores(bias: Array, scores: tuple[int, ...]) -> NDArray[np.float32]:
    x = as_numpy(bias, "bias", any_strides=True)
    check_floating(x, "bias")
    with np.errstate(over="ignore"):  # float64's lowest number, a common "masked", becomes -inf
        return broadcast_scores(x.astype(np.float32, copy=False), "bias", scores)


def mask_scores(mask: Array, scores: tuple[int, ...]) -> NDArray[np.bool_]:
    x = as_numpy(mask, "mask", any_strides=True)
    if x.dtype != np.bool_:
        raise TypeError(f"mask: got dtype {x.dtype}, expected bool (a mask to add goes to bias)")
    return broadcast_scores(x, "mask", scores)


def slopes_per_head(alibi_slopes: Array, batch_heads: tuple[int, ...]) -> NDArray[np.float32]:
    """Slopes as contiguous `[B, Hq]`."""
    x = as_numpy(alibi_slopes, "alibi_slopes")
    check_floating(x, "alibi_slopes")
    heads = batch_heads[-1]
    batch = math.prod(batch_heads[:-1])
    if x.shape not in ((heads,), (batch, heads)):
        raise ValueError(f"alibi_slopes: got shape {x.shape}, expected {(heads,)} or {(batch, heads)}")
    return np.ascontiguousarray(np.broadcast_to(x, (batch, heads)), np.float32)


def per_head(values: Array, name: str, heads: int) -> NDArray[np.float32]:
    x = as_numpy(values, name)
    check_floating(x, name)
    if x.shape != (heads,):
        raise ValueError(f"{name}: got shape {x.shape}, expected {(heads,)}, one per query head")
    return np.ascontiguousarray(x, np.float32)


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
    inputs: dict[str, NDArray[Any] | None],
) -> NDArray[Any]:
    """Where the result goes: the caller's `out`, or new memory."""
    if out is None:
        return np.empty(shape, dtype)
    return as_output(out, like=q, shape=shape, dtype=dtype, inputs=inputs)


def returned(out: Array | None, q: Array, result: NDArray[Any], lse: NDArray[np.float32] | None) -> Any:
    output = like(q, result) if out is None else out
    return output if lse is None else (output, like(q, lse))
