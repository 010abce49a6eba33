"""Queries on grids: what each sees along each axis, and the one way to the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import attention_inputs, check_floating, check_heads, flag, integer
from longattn.dense._options import Options, score_options
from longattn.dense.attention import attention
from longattn.dense.attention_backward import saved_output, saved_sums

#: The most axes of a grid.
MOST_AXES = 3

#: Gradient of the output, output, log-sum-exp and its gradient or `None`, checked.
Saved = tuple[NDArray[Any], NDArray[Any], NDArray[np.float32], NDArray[np.float32] | None]


@dataclass(frozen=True, slots=True)
class GridAxis:
    """Queries along one axis, and the keys that each sees.

    Attributes:
        keys: keys along the axis.
        intervals: `[group, start, end, position]` of each query, uint32 `[n, 4]`: it sees the keys
            `group + dilation * u` with `start <= u < end`, and is itself at `position`, counted like `u`.
        dilation: distance between neighbouring keys of a group.
        step: queries go together best by multiples of this.
    """

    keys: int
    intervals: NDArray[np.uint32]
    dilation: int = 1
    step: int = 1


@dataclass(frozen=True, slots=True)
class GridBias:
    """Biases by the distance of key and query, entry `key - position + zero` along each axis.

    Attributes:
        sizes: entries along each axis.
        zeros: entries of distance 0.
        table: `[Hq, *sizes]`, or `None`.
        by_axis: per axis `[B, Hq, L, size]`, added up, or `None`.
    """

    sizes: tuple[int, ...]
    zeros: tuple[int, ...]
    table: NDArray[np.float32] | None = None
    by_axis: tuple[NDArray[np.float32], ...] | None = None

    def _for_kernel(self) -> tuple[Any, ...]:
        missing = MOST_AXES - len(self.sizes)
        sizes, zeros = (1,) * missing + self.sizes, (0,) * missing + self.zeros
        by_axis = None
        if self.by_axis is not None:
            none = np.zeros(math.prod(self.by_axis[0].shape[:-1]), np.float32)
            by_axis = [none] * missing + [np.ascontiguousarray(x).ravel() for x in self.by_axis]
        return list(sizes), list(zeros), self.table, by_axis


def window_axis(length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> GridAxis:
    """The windows of neighbourhood attention along an axis of `length` tokens.

    Token `x` has the place `u = x // dilation` among the `n` tokens of its group `x % dilation`. Not causal, its
    window is `window` tokens around the leader `min(stride * (u // stride) + stride // 2, n - 1)` of its stride
    group, moved to lie inside the group (one more to the left than to the right where `window` is even). Causal, it
    is the tokens up to its own from `window - 1` before the leader `min(stride * (u // stride) + stride - 1, n - 1)`.
    """
    x = np.arange(length, dtype=np.int64)
    group, u = x % dilation, x // dilation
    count = (length - group + dilation - 1) // dilation
    if causal:
        leader = np.minimum(stride * (u // stride) + stride - 1, count - 1)
        start, end = np.maximum(leader - window + 1, 0), u + 1
    else:
        leader = np.minimum(stride * (u // stride) + stride // 2, count - 1)
        left = window // 2
        start = np.clip(leader, left, count - window + left) - left
        end = start + window
    intervals = np.stack([group, start, end, u], axis=1).astype(np.uint32)
    return GridAxis(length, intervals, dilation, stride)


def per_axis(value: object, name: str, axes: int, low: int) -> tuple[int, ...]:
    """One integer per axis, from one for all or a sequence."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != axes:
            raise ValueError(f"{name}: got {len(value)} numbers, expected {axes}, one per axis of the grid")
        return tuple(integer(x, name, low) for x in value)
    return (integer(value, name, low),) * axes


def window_axes(
    shape: tuple[int, ...], window: object, stride: object, dilation: object, causal: object
) -> tuple[GridAxis, ...]:
    """The checked windows of a grid of this shape."""
    axes = len(shape)
    sizes, steps = per_axis(window, "window", axes, 1), per_axis(stride, "stride", axes, 1)
    gaps = per_axis(dilation, "dilation", axes, 1)
    if isinstance(causal, Sequence) and not isinstance(causal, str):
        if len(causal) != axes:
            raise ValueError(f"causal: got {len(causal)} flags, expected {axes}, one per axis of the grid")
        flags = tuple(flag(x, "causal") for x in causal)
    else:
        flags = (flag(causal, "causal"),) * axes
    for a, (length, size, step, gap) in enumerate(zip(shape, sizes, steps, gaps, strict=True)):
        if length and size * gap > length:
            raise ValueError(
                f"window: got {size} with dilation {gap} on axis {a}, expected window * dilation of at most its "
                f"length {length}"
            )
        if step > size:
            raise ValueError(f"stride: got {step} on axis {a}, expected at most the window {size}")
    return tuple(window_axis(*given) for given in zip(shape, sizes, steps, gaps, flags, strict=True))


def grid_inputs(q: Array, k: Array, v: Array) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Queries `[B, Hq, X1.., D]`, keys and values of one to three axes that fit each other, lengths aside."""
    qn, kn, vn = attention_inputs(q, k, v, ranks=(4, 5, 6))
    for x, name in ((kn, "k"), (vn, "v")):
        if x.shape[0] != qn.shape[0]:
            raise ValueError(f"{name}: got batch {x.shape[0]}, expected {qn.shape[0]} as in q")
    check_heads(qn.shape[1], kn.shape[1], vn.shape[1])
    if vn.shape[2:-1] != kn.shape[2:-1]:
        raise ValueError(f"v: got a grid {vn.shape[2:-1]}, expected {kn.shape[2:-1]} as in k")
    return qn, kn, vn


def own_grid(qn: NDArray[Any], kn: NDArray[Any]) -> tuple[int, ...]:
    """The grid that queries and keys share."""
    grid = qn.shape[2:-1]
    if kn.shape[2:-1] != grid:
        raise ValueError(f"k: got a grid {kn.shape[2:-1]}, expected {grid} as in q")
    return grid


def extra_inputs(
    extra_k: Array | None, extra_v: Array | None, qn: NDArray[Any], kn: NDArray[Any], vn: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Keys and values that every query sees besides, `[B, Hkv, Lx, D]`."""
    if extra_k is None and extra_v is None:
        return None
    if extra_k is None or extra_v is None:
        missing = "extra_k" if extra_k is None else "extra_v"
        raise ValueError(f"{missing}: got none, expected both extra_k and extra_v, or neither")
    xk, xv = as_numpy(extra_k, "extra_k"), as_numpy(extra_v, "extra_v")
    for x, own, name, other in ((xk, kn, "extra_k", "k"), (xv, vn, "extra_v", "v")):
        if x.dtype != own.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {own.dtype} as {other}")
        if x.ndim != 4 or x.shape[:2] != own.shape[:2] or x.shape[-1] != own.shape[-1]:
            expected = f"({own.shape[0]}, {own.shape[1]}, n, {own.shape[-1]})"
            raise ValueError(f"{name}: got shape {x.shape}, expected {expected}")
    if xk.shape[2] != xv.shape[2]:
        raise ValueError(f"extra_v: got length {xv.shape[2]}, expected {xk.shape[2]} as in extra_k")
    return xk, xv


def table_bias(bias: Array | None, heads: int, window: tuple[int, ...]) -> GridBias | None:
    """A table `[Hq, 2 w1 - 1, ..]` of windows of that size."""
    if bias is None:
        return None
    x = as_numpy(bias, "bias")
    check_floating(x, "bias")
    sizes = tuple(2 * w - 1 for w in window)
    if x.shape != (heads, *sizes):
        raise ValueError(f"bias: got shape {x.shape}, expected {(heads, *sizes)}")
    return GridBias(sizes, tuple(w - 1 for w in window), np.ascontiguousarray(x, np.float32))


def flat(x: NDArray[Any]) -> NDArray[Any]:
    """`[B, H, X1.., D]` as `[B, H, L, D]`: the same memory where one step leads from token to token, else a copy."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:-1]), x.shape[-1])


def kernel_axes(axes: Sequence[GridAxis]) -> list[tuple[int, int, int, NDArray[np.uint32]]]:
    """The axes as the kernel takes them, three of them."""
    none = GridAxis(1, np.array([[0, 0, 1, 0]], np.uint32))
    every = (none,) * (MOST_AXES - len(axes)) + tuple(axes)
    return [(axis.keys, axis.dilation, axis.step, axis.intervals) for axis in every]


def grid_options(q: tuple[int, ...], scale: float | Array | None, softcap: float, sinks: Array | None) -> Options:
    """The options of a kernel call with queries of shape `q`."""
    keys = math.prod(q[2:-1])
    return score_options((*q[:2], keys, q[-1]), keys, span=1, scale=scale, softcap=softcap, sinks=sinks)


def attend(
    qn: NDArray[Any],
    kn: NDArray[Any],
    vn: NDArray[Any],
    axes: Sequence[GridAxis],
    options: Options,
    *,
    bias: GridBias | None = None,
    extra: tuple[NDArray[Any], NDArray[Any]] | None = None,
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Output `[B, Hq, X1.., Dv]` and lse `[B, Hq, X1..]`."""
    shape = qn.shape[:-1]
    result, lse = np.empty((*shape, vn.shape[-1]), qn.dtype), np.empty(shape, np.float32)
    if not lse.size:
        return result, lse
    q4, k4, v4 = (flat(x) for x in (qn, kn, vn))
    if extra is not None and extra[0].shape[2]:
        # The softmax goes on from the extra keys' part, which is therefore not rounded to the dtype of q.
        factor = options["scale"]
        factor = factor[..., 0] if isinstance(factor, np.ndarray) else factor
        cap = options.get("softcap", 0.0)
        state = attention(q4.astype(np.float32), *extra, scale=factor, softcap=cap, return_lse=True)
        options = {**options, "state": state}
    out4, lse3 = flat(result), lse.reshape(*shape[:2], -1)
    given = None if bias is None else bias._for_kernel()
    _core.neighbourhood(q4, k4, v4, out4, lse3, kernel_axes(axes), given, options)
    return result, lse


def saved_forward(
    d_out: Array, out: Array, lse: Array, d_lse: Array | None, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Saved:
    """What gradients start from: outputs of `shape` `[B, Hq, X1.., Dv]`, sums without the last axis."""
    single = np.dtype(np.float32)
    out_n, d_out_n = saved_output(out, "out", shape, dtype), saved_output(d_out, "d_out", shape, dtype)
    sums = saved_sums(lse, "lse", shape[:-1], single)
    return d_out_n, out_n, sums, None if d_lse is None else saved_sums(d_lse, "d_lse", shape[:-1], single)


def attend_backward(
    saved: Saved,
    qn: NDArray[Any],
    kn: NDArray[Any],
    vn: NDArray[Any],
    axes: Sequence[GridAxis],
    options: Options,
    *,
    bias: GridBias | None = None,
    d_bias: NDArray[np.float32] | None = None,
    d_sinks: NDArray[np.float32] | None = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Gradients of `attend` by queries, keys and values; those of the bias' table and of the sinks go into arrays."""
    d_out, out, lse, d_lse = saved
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (qn, kn, vn))
    if lse.size:
        d4, q4, k4, v4, o4 = (flat(x) for x in (d_out, qn, kn, vn, out))
        lse3, d_lse3 = lse.reshape(*lse.shape[:2], -1), None if d_lse is None else d_lse.reshape(*lse.shape[:2], -1)
        _core.neighbourhood_backward(
            (d4, q4, k4, v4, o4, lse3, d_lse3),
            (flat(dq), flat(dk), flat(dv)),
            d_sinks,
            None if d_bias is None else d_bias.reshape(-1),
            kernel_axes(axes),
            None if bias is None else bias._for_kernel(),
            options,
        )
    return dq, dk, dv
