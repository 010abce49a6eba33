"""Linear attention with gates on a GPU, from plain linear attention to gated delta rules: by chunks, or by tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from longattn.gpu._checks import check_shared, heads_view, is_aligned
from longattn.gpu._device import KERNEL_DTYPES, Device, View, device_of

#: Tokens up to which they are taken one by one, which needs one launch and one pass over the state.
STEPS = 8

_CHUNK = 16
_THREADS = 128
_COLUMNS = 64
_COLUMNS_F32 = 32
_WARPS = 4
_ALIGNMENT = 16
#: What the warps of a block of steps sum for each other, twice: two numbers a column and one more, a warp.
_STEP_SUMS = 2 * (2 * _WARPS * _COLUMNS_F32 + _WARPS)


def chunked_recurrence(
    q: Any,
    k: Any,
    v: Any,
    g: Any | None = None,
    beta: Any | None = None,
    *,
    scale: float | None = None,
    initial_state: Any | None = None,
    device: Device | None = None,
) -> tuple[Any, Any]:
    """Causal linear attention with a state `S` `[D, Dv]` per head.

        S_t = Diag(e^g_t) S_{t-1} + k_t u_t^T,   o_t = scale * S_t^T q_t
        u_t = v_t, or with `beta` the delta rule  beta_t (v_t - (Diag(e^g_t) S_{t-1})^T k_t)

    With a gate per channel and `beta` this is Kimi Delta Attention, with a gate per head Gated DeltaNet, without a
    gate DeltaNet; without `beta` gated linear attention, retention (a constant gate) and plain linear attention.

    Args:
        q: queries `[B, H, L, D]` on a GPU; float32, float16 or bfloat16; D 64, 128 or 256. Not normalised here.
        k: keys, shape and dtype of `q`.
        v: values `[B, Hv, L, Dv]`, dtype of `q`; Hv a multiple of H, value head `h` belongs to head `h // (Hv // H)`.
        g: log gates, natural log, float32 `[Hv]` for all rows, `[B, Hv, L]` or `[B, Hv, L, D]`; at most 0, which is
            not checked on the device. `None` is no decay.
        beta: rates of the delta rule, float32 `[B, Hv, L]`; `None` is none.
        scale: factor of the output; `None` is `D ** -0.5`.
        initial_state: float32 `[B, Hv, D, Dv]`, contiguous; `None` is zeros.
        device: the back end; `None` is that of `q`.

    Returns:
        Output `[B, Hv, L, Dv]` in the dtype of `q`, and the state after the last row, float32 `[B, Hv, D, Dv]`. A call
        with L = 1 and the last state is a decode step. Up to 8 rows are taken one by one.

    Raises:
        TypeError: arrays of no GPU, or another dtype.
        ValueError: shapes that do not fit.

    With float16 and bfloat16 and more than 8 rows, products are those of tensor cores: what goes into them (decayed
    keys and queries, the state as it is read) is rounded to that dtype once each; states, sums and the solve of a chunk
    are float32, as everything is for float32 inputs and for up to 8 rows.

    Cost: `L * Dv * (3 * D + 16)` multiply-adds per head and `L * 7 * D` exponentials (16 for float32);
        `L * (3 * D + 32) * 2` bytes of parts per value head, twice that for float32. Up to 8 rows: the state is read
        and written once, `8 * D * Dv` bytes per value head, in one launch.
    """
    device = device or device_of(q, "q")
    queries = heads_view(device, q, "q")
    keys = heads_view(device, k, "k", queries.dtype)
    values = _rows_view(device, v, "v", queries.dtype)
    batch, heads, length, dim = queries.shape
    if keys.shape != queries.shape:
        raise ValueError(f"k: got shape {keys.shape}, expected that of q, {queries.shape}")
    value_heads, value_dim = values.shape[1], values.shape[3]
    if values.shape[0] != batch or values.shape[2] != length or heads == 0 or value_heads % heads:
        raise ValueError(f"v: got shape {values.shape}, expected [{batch}, a multiple of {heads}, {length}, Dv]")
    gates = None if g is None else _numbers(device, g, "g", (batch, value_heads, length), dim)
    rates = None if beta is None else _numbers(device, beta, "beta", (batch, value_heads, length), None)
    shape = (batch, value_heads, dim, value_dim)
    initial = None if initial_state is None else device.view(device.contiguous(initial_state), "initial_state")
    if initial is not None and (initial.shape != shape or initial.dtype != "float32"):
        raise ValueError(f"initial_state: got {initial.dtype} {initial.shape}, expected float32 {shape}")
    out = device.empty(values.shape, queries.dtype, q)
    state = device.empty(shape, "float32", q)
    if math.prod(shape) == 0:
        return out, state
    if 0 < length <= STEPS:
        results = device.view(out, "out"), device.view(state, "state")
        _steps(device, queries, keys, values, gates, rates, initial, results, scale)
        return out, state
    chunks = -(-length // _CHUNK)
    single = queries.dtype == "float32"
    source, name = ("recurrence_f32" if single else "recurrence"), f"{KERNEL_DTYPES[queries.dtype]}_{dim}"
    if single:
        size = 4 * (2 * _CHUNK * _CHUNK + dim + 3 * _CHUNK * dim)
        columns, to_prepare = _COLUMNS_F32, 4 * (3 * _CHUNK * (dim + 1) + _CHUNK * _CHUNK)
        to_carry = 2 * size + 4 * (_WARPS * 2 * _CHUNK * columns + _CHUNK * columns)
    else:
        size = 2 * (2 * _CHUNK * _CHUNK + 3 * _CHUNK * dim) + 4 * dim
        columns, to_prepare = _COLUMNS, 8 * _CHUNK * (dim + 8) + 8 * _CHUNK * _CHUNK
        to_carry = 2 * (size + 2 * _CHUNK * columns)
    check_shared(device, queries, "q", max(to_prepare, to_carry))
    parts = device.view(device.empty((batch, value_heads, max(chunks, 1), size // 4), "float32", q), "parts")
    if chunks:
        device.kernel(source, f"recurrence_prepare_{name}")(
            (chunks, value_heads, batch),
            (_THREADS,),
            (
                queries.pointer,
                keys.pointer,
                None if gates is None else gates.pointer,
                None if rates is None else rates.pointer,
                parts.pointer,
                *_strides(queries, keys),
                *_strides_of_gates(gates, rates),
                np.int32(value_heads // heads),
                np.int32(length),
                np.float32(dim**-0.5 if scale is None else scale),
            ),
            to_prepare,
        )
    result = device.view(out, "out")
    device.kernel(source, f"recurrence_carry_{name}")(
        (-(-value_dim // columns), value_heads, batch),
        (_THREADS,),
        (
            parts.pointer,
            values.pointer,
            result.pointer,
            None if initial is None else initial.pointer,
            device.view(state, "state").pointer,
            *_strides(values, result),
            np.int32(length),
            np.int32(value_dim),
            np.int32(rates is not None),
            *(() if single else (np.int32(_by_pieces(values)),)),
        ),
        to_carry,
    )
    return out, state


def _steps(
    device: Device,
    q: View,
    k: View,
    v: View,
    gates: View | None,
    rates: View | None,
    initial: View | None,
    results: tuple[View, View],
    scale: float | None,
) -> None:
    """A few rows, one after another: a block for each value head and some of its columns."""
    out, state = results
    batch, heads, length, dim = q.shape
    value_heads, value_dim = v.shape[1], v.shape[3]
    aligned = value_dim * state.itemsize % _ALIGNMENT == 0
    aligned = aligned and all(x.address % _ALIGNMENT == 0 for x in (initial, state) if x is not None)
    device.kernel("recurrence_step", f"recurrence_step_{KERNEL_DTYPES[q.dtype]}_{dim}")(
        (-(-value_dim // _COLUMNS_F32), value_heads, batch),
        (_THREADS,),
        (
            q.pointer,
            k.pointer,
            None if gates is None else gates.pointer,
            None if rates is None else rates.pointer,
            v.pointer,
            out.pointer,
            None if initial is None else initial.pointer,
            state.pointer,
            *_strides(q, k),
            *_strides_of_gates(gates, rates),
            *_strides(v, out),
            *(np.int32(n) for n in (value_heads // heads, length, value_dim, aligned)),
            np.float32(dim**-0.5 if scale is None else scale),
        ),
        4 * (3 * length * dim + _STEP_SUMS),
    )


def _strides_of_gates(gates: View | None, rates: View | None) -> tuple[np.int64, ...]:
    """Of batch, head, row and channel of the gates, of batch, head and row of the rates; 0 of what there is not."""
    none = np.int64(0)
    of_gates = (none,) * 4 if gates is None else (*_strides(gates), np.int64((*gates.strides, 0)[3]))
    return *of_gates, *((none,) * 3 if rates is None else _strides(rates))


def _strides(*views: View) -> tuple[np.int64, ...]:
    return tuple(np.int64(stride) for view in views for stride in view.strides[:3])


def _by_pieces(v: View) -> bool:
    """Whether rows can be copied in pieces of 16 bytes."""
    return v.shape[3] * v.itemsize % _ALIGNMENT == 0 and is_aligned(v, _ALIGNMENT)


def _rows_view(device: Device, x: Any, name: str, dtype: str) -> View:
    """`[B, H, L, any]` with a contiguous last axis."""
    view = device.view(x, name)
    if view.dtype != dtype:
        raise TypeError(f"{name}: got dtype {view.dtype}, expected {dtype}")
    if len(view.shape) != 4:
        raise ValueError(f"{name}: got shape {view.shape}, expected [batch, heads, length, dim]")
    return view if view.strides[3] == 1 else device.view(device.contiguous(x), name)


def _numbers(device: Device, x: Any, name: str, shape: tuple[int, ...], channels: int | None) -> View:
    """A float32 array of a number per row, or where `channels` says so also per head, or per row and channel."""
    view = device.view(x, name)
    if channels is not None and view.shape == shape[1:2] and view.dtype == "float32":
        return replace(view, shape=shape, strides=(0, *view.strides, 0))
    allowed = [shape] if channels is None else [shape[1:2], shape, (*shape, channels)]
    if view.dtype != "float32" or view.shape not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{name}: got {view.dtype} {view.shape}, expected float32 {expected}")
    return view
