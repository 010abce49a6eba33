"""Calls of the engine of memories that learn while they read: what each checks, and the state that it hands on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import (
    all_within,
    batched,
    check_float_storage,
    check_floating,
    finite,
    flag,
    integer,
    real,
    result_array,
)

Float32 = NDArray[np.float32]

#: Tokens whose gradients are taken at the same weights, where nothing else is said.
CHUNK = 16
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryState:
    """A memory after some rows: what a later call needs to go on exactly there, at any row.

    Attributes:
        live: float32 `[B, H, P]`, the weights (of `norm` and `softmax` retentions, what these are taken of), one matrix
            `[inputs, outputs]` after another.
        step: float32 `[B, H, P]`, the last step, where there is momentum; else `[0]`.
        frozen: float32 `[B, H, P]`, the weights with which the chunk at hand began.
        position: rows since then.
        shapes: shapes of the matrices.
    """

    live: Float32
    step: Float32
    frozen: Float32
    position: int
    shapes: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> tuple[Float32, ...]:
        """The matrices at hand, `[B, H, inputs, outputs]`."""
        found, at = [], 0
        for inputs, outputs in self.shapes:
            part = self.live[..., at : at + inputs * outputs]
            found.append(part.reshape(*part.shape[:-1], inputs, outputs))
            at += inputs * outputs
        return tuple(found)


def fast_weight(
    q: Array,
    k: Array,
    v: Array,
    rate: Array,
    *,
    rate_name: str,
    weights: Sequence[Array] | None,
    initial_state: MemoryState | None,
    out_state: MemoryState | None = None,
    keep: Float32 | None = None,
    momentum: Array | None = None,
    threshold: Array | None = None,
    bias: bool = False,
    activation: str = "silu",
    residual: tuple[Array, Array, float] | None = None,
    loss: tuple[str, float, float] = ("square", 0.5, 0.0),
    retention: tuple[str, float, bool] = ("plain", 0.0, False),
    before: bool = False,
    chunk_size: object = CHUNK,
    normalize_qk: object = False,
    scale: object = 1.0,
    out: Array | None = None,
) -> tuple[Array, MemoryState]:
    """Queries read a memory that learns keys and values, with everything checked.

    Args:
        q: queries `[B, Hq, L, D]` or `[Hq, L, D]`, `Hq` a multiple of `H`.
        k: keys `[B, H, L, D]`.
        v: values `[B, H, L, Dv]`.
        rate: step sizes, at least 0, floating `[B, H, L]`.
        rate_name: what the caller calls them.
        weights: first matrices, each `[inputs, outputs]`, with heads or batch and heads in front; `None` is one of 0.
        initial_state: what an earlier call returned, in place of `weights`.
        out_state: one whose arrays receive the last; `None` is arrays of its own.
        keep: factors of weights, `[B, H, L, 1]`.
        momentum: factors of steps, called "eta", `[B, H, L]`.
        threshold: of Huber losses, called "delta", `[B, H, L]`.
        bias: whether matrices have a row more, for an input of 1.
        activation: between layers.
        residual: `x + norm(..)` around the network: factors and summands `[H, Dv]` and what is added to variances.
        loss: as the core names it, with two numbers.
        retention: likewise, with a number and whether each token's weights are read.
        before: whether queries read the weights before their own row.
        chunk_size: rows whose gradients are taken at the same weights.
        normalize_qk: divide rows of `q` and `k` by the root of their sum of squares and 1e-6.
        scale: factor of queries.
        out: array for the output.

    Returns:
        `(output, state)`.
    """
    qn, kn, vn = (as_numpy(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    for x, name in ((qn, "q"), (kn, "k"), (vn, "v")):
        check_float_storage(x, name)
        if x.ndim not in (3, 4) or x.ndim != qn.ndim:
            raise ValueError(f"{name}: got shape {x.shape}, expected rank {qn.ndim if qn.ndim in (3, 4) else '3 or 4'}")
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: got head_dim 0 in shape {x.shape}, expected at least 1")
    if kn.shape[:-3] != qn.shape[:-3] or kn.shape[-2:] != qn.shape[-2:]:
        raise ValueError(f"k: got shape {kn.shape}, expected batch, length and head_dim of q, {qn.shape}")
    if vn.shape[:-1] != kn.shape[:-1]:
        raise ValueError(f"v: got shape {vn.shape}, expected {kn.shape[:-1]} in front as k")
    heads, q_heads = kn.shape[-3], qn.shape[-3]
    if heads == 0 or q_heads == 0 or q_heads % heads:
        raise ValueError(f"q: got {q_heads} heads, expected a positive multiple of the {heads} heads of k")
    batch = qn.shape[0] if qn.ndim == 4 else 1
    dim, value_dim = kn.shape[-1], vn.shape[-1]
    if residual is not None and dim != value_dim:
        raise ValueError(f"v: got head_dim {value_dim}, expected {dim} as in k: the memory adds its input")
    chunk = integer(chunk_size, "chunk_size", 1)
    unit = 1e-6 if flag(normalize_qk, "normalize_qk") else None
    factor = finite(scale, "scale")
    rates = gate(rate, rate_name, kn, high=None)
    slowed = None if momentum is None else gate(momentum, "eta", kn, high=1.0)
    limits = None if threshold is None else gate(threshold, "delta", kn, high=None)
    around = None
    if residual is not None:
        rows = [_rows(x, name, heads, value_dim) for x, name in zip(residual, ("gain", "shift"), strict=False)]
        around = (rows[0], rows[1], real(residual[2], "eps"))
        if not 0 <= around[2] < np.inf:
            raise ValueError(f"eps: got {residual[2]}, expected at least 0")
    result = result_array(out, q, (*qn.shape[:-1], value_dim), qn.dtype, {"q": qn, "k": kn, "v": vn})
    first = _start(weights, initial_state, (batch, heads), (dim, value_dim), bias, slowed is not None, chunk)
    state = moved(first, out_state)
    widths = [dim, *(outputs for _, outputs in state.shapes)]
    _core.fast_weight(
        batched(qn, 4), batched(kn, 4), batched(vn, 4), rates, keep, slowed, limits, widths, activation, around, loss,
        retention, before, chunk, state.position, unit, factor, bias, batched(result, 4), state.live.reshape(-1),
        state.step.reshape(-1), state.frozen.reshape(-1),
    )  # fmt: skip
    position = (state.position + kn.shape[-2]) % chunk
    last = MemoryState(live=state.live, step=state.step, frozen=state.frozen, position=position, shapes=state.shapes)
    returned: Any = like(q, result) if out is None else out
    return returned, last


def gate(x: Array, name: str, keys: NDArray[Any], *, high: float | None) -> Float32:
    """Numbers of at least 0 per row, `[B, H, L]` or `[H, L]` as the keys, or one for all, as float32 `[B, H, L, 1]`."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        x = np.asarray(real(x, name))
    xn = as_numpy(x, name, any_strides=True)
    check_floating(xn, name)
    if xn.shape not in ((), keys.shape[:-1]):
        raise ValueError(f"{name}: got shape {xn.shape}, expected {keys.shape[:-1]}, or one number")
    rows = np.ascontiguousarray(np.broadcast_to(xn, keys.shape[:-1]), np.float32)
    if not all_within(rows, 0, _LARGEST if high is None else high):
        expected = "finite numbers of at least 0" if high is None else f"numbers from 0 to {high:g}"
        raise ValueError(f"{name}: got a number outside its range, expected {expected}")
    return batched(rows, 3)[..., None]


def _rows(x: Any, name: str, heads: int, width: int) -> Float32:
    xn = as_numpy(x, name, any_strides=True)
    check_floating(xn, name)
    if xn.shape not in ((width,), (heads, width)):
        raise ValueError(f"{name}: got shape {xn.shape}, expected {(heads, width)} or {(width,)}")
    return np.ascontiguousarray(np.broadcast_to(xn, (heads, width)), np.float32).ravel()


def _start(
    weights: Sequence[Array] | None,
    state: MemoryState | None,
    front: tuple[int, int],
    dims: tuple[int, int],
    bias: bool,
    momentum: bool,
    chunk: int,
) -> MemoryState:
    """The state before the first row, from first matrices or as it came."""
    one = int(bias)
    if state is not None:
        if not isinstance(state, MemoryState):
            raise TypeError(f"initial_state: got {type(state).__name__}, expected a MemoryState")
        if weights is not None:
            raise ValueError("weights: got some beside initial_state, which holds them, expected one of both")
        ends = (state.shapes[0][0], state.shapes[-1][1])
        if state.live.shape[:2] != front or ends != (dims[0] + one, dims[1]) or state.position >= chunk:
            raise ValueError(
                f"initial_state: got weights {state.live.shape} of matrices {state.shapes} at row {state.position}, "
                f"expected {front} in front, {dims[0] + one} inputs and {dims[1]} outputs, and a row below {chunk}"
            )
        if momentum != (state.step.ndim == 3):
            raise ValueError("initial_state: got one with momentum and none now, or the other way, expected the same")
        return state
    if weights is None:
        weights = [np.zeros((dims[0] + one, dims[1]), np.float32)]
    if not isinstance(weights, tuple | list) or not weights:
        raise TypeError(f"weights: got {type(weights).__name__}, expected a sequence of matrices")
    parts, shapes = [], []
    for i, matrix in enumerate(weights):
        w = as_numpy(matrix, f"weights[{i}]", any_strides=True)
        check_floating(w, f"weights[{i}]")
        if w.ndim < 2 or w.ndim > 4 or 0 in w.shape[-2:]:
            raise ValueError(f"weights[{i}]: got shape {w.shape}, expected [.., inputs, outputs]")
        try:
            full = np.broadcast_to(w, (*front, *w.shape[-2:]))
        except ValueError:
            raise ValueError(f"weights[{i}]: got shape {w.shape}, expected {front} or fewer in front") from None
        parts.append(reshaped(full.astype(np.float32), *front, -1))
        shapes.append((w.shape[-2], w.shape[-1]))
    fits = all(before[1] + one == after[0] for before, after in pairwise(shapes))
    if not fits or shapes[0][0] != dims[0] + one or shapes[-1][1] != dims[1]:
        raise ValueError(
            f"weights: got matrices {shapes}, expected {dims[0] + one} inputs, {dims[1]} outputs, and inputs of one "
            f"that are outputs of the one before{' and one more' if bias else ''}"
        )
    live = np.ascontiguousarray(np.concatenate(parts, axis=-1))
    step = np.zeros_like(live) if momentum else np.zeros(0, np.float32)
    return MemoryState(live=live, step=step, frozen=live, position=0, shapes=tuple(shapes))


def moved(state: MemoryState, to: object) -> MemoryState:
    """The same state in arrays of its own, or in those of `to`, which may be its own already."""
    names = ("live", "step", "frozen")
    given = [getattr(state, name) for name in names]
    if to is None:
        arrays = [x.copy() for x in given]
    else:
        if not isinstance(to, MemoryState):
            raise TypeError(f"out_state: got {type(to).__name__}, expected a MemoryState")
        arrays = [getattr(to, name) for name in names]
        for i, (x, own, name) in enumerate(zip(given, arrays, names, strict=True)):
            if own.shape != x.shape or own.dtype != np.float32 or not own.flags.carray:
                raise ValueError(
                    f"out_state: got {name} {own.dtype} {own.shape}, expected a contiguous, writable float32 {x.shape}"
                )
            others = [*(y for j, y in enumerate(given) if j != i or y is not own), *arrays[:i]]
            if any(np.may_share_memory(own, y) for y in others):
                raise ValueError(f"out_state: got {name} that shares memory with other arrays, expected its own")
        for x, own in zip(given, arrays, strict=True):
            if own is not x:
                own[...] = x
    return MemoryState(live=arrays[0], step=arrays[1], frozen=arrays[2], position=state.position, shapes=state.shapes)
