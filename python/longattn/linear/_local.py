"""Depthwise convolutions of values, head by head: of those that lie as a map, and causal ones along rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating
from longattn.linear.convolution import causal_conv1d

Float32 = NDArray[np.float32]

#: Rows of which all heads are convolved at once.
TOGETHER = 64


def local_values(
    v: NDArray[Any], weight: Array | None, bias: Array | None, size: tuple[int, int], first: int = 0
) -> Float32 | None:
    """Float32 `[B, H, L, Dv]`: the convolution of each head's values, zeros in the `first` tokens, which have no place.

    Args:
        v: values `[B, H, first + height * width, Dv]`.
        weight: `[Dv, 1, kh, kw]`, shared by all heads, `[H * Dv, 1, kh, kw]`, or `[B, H * Dv, kh, kw]`, one per entry
            of the batch; the axis of length 1 may be left out. `None`: there is none.
        bias: `[Dv]` or `[H * Dv]`.
        size: height and width.
        first: tokens in front of the map.
    """
    if weight is None:
        if bias is not None:
            raise ValueError("dwc_bias: got a bias without dwc_weight, expected None")
        return None
    batch, heads, tokens, dim = v.shape
    w = as_numpy(weight, "dwc_weight")
    check_floating(w, "dwc_weight")
    per_entry = w.ndim == 4 and w.shape[:2] == (batch, heads * dim) and w.shape[1] != 1
    if not per_entry and w.ndim == 4 and w.shape[1] == 1:
        w = w[:, 0]
    if not (per_entry or (w.ndim == 3 and w.shape[0] in (dim, heads * dim))) or 0 in w.shape:
        raise ValueError(f"dwc_weight: got shape {w.shape}, expected [{dim}, 1, kh, kw] or [{heads * dim}, 1, kh, kw]")
    channels = w.shape[-3]
    b = None
    if bias is not None:
        b = as_numpy(bias, "dwc_bias")
        check_floating(b, "dwc_bias")
        if b.shape != (channels,):
            raise ValueError(f"dwc_bias: got shape {b.shape}, expected {(channels,)}")
        b = np.ascontiguousarray(b, np.float32)
    taps = w.shape[-2:]
    centre = (taps[0] // 2, taps[1] // 2)
    added = np.empty((batch, heads, tokens, dim), np.float32)
    added[:, :, :first] = 0
    kernels = np.ascontiguousarray(np.moveaxis(w, -3, -1), np.float32)  # [..., kh, kw, channels]
    for head in range(heads):
        mine = slice(head * dim, (head + 1) * dim) if channels != dim else slice(None)
        own = np.ascontiguousarray(kernels[..., mine])
        own_bias = None if b is None else np.ascontiguousarray(b[mine])
        places, to = (x[:, head, first:].reshape(batch, *size, dim) for x in (v, added))
        if per_entry:
            for n in range(batch):
                _core.depthwise(places[n : n + 1], own[n], centre, to[n : n + 1], bias=own_bias)
        else:
            _core.depthwise(places, own, centre, to, bias=own_bias)
    return added


def add_causal_convolution(rows: Float32, v: NDArray[Any], filters: Float32, before: Float32) -> Float32:
    """Adds the convolution of each head's values to the rows of the queries that read it.

    Args:
        rows: `[B, Hq, L, Dv]`, `Hq` a multiple of `H`.
        v: values `[B, H, L, Dv]`.
        filters: `[H, Dv, K]`, of which the first tap meets a row itself.
        before: values before the first row, `[B, H, K - 1, Dv]`.

    Returns:
        The last values that later rows see, in the shape of `before`.
    """
    batch, heads, length, value_dim = v.shape
    last, group = np.empty(before.shape, np.float32), rows.shape[1] // heads
    # Of few rows, all heads are channels of one call; of many, a copy of all values would cost more than calls.
    together = heads if length <= TOGETHER else 1
    for first in range(0, heads, together):
        some = slice(first, first + together)
        width = together * value_dim
        values = v[:, some].swapaxes(1, 2).astype(np.float32, copy=False).reshape(batch, length, width)
        kept = before[:, some].swapaxes(1, 2).reshape(batch, before.shape[2], width)
        taps = filters[some, :, ::-1].reshape(width, filters.shape[2])
        wide = np.empty(values.shape, np.float32)
        _, reached = causal_conv1d(values, taps, initial_state=kept, out=wide)
        last[:, some] = reached.reshape(batch, before.shape[2], together, value_dim).swapaxes(1, 2)
        added = wide.reshape(batch, length, together, value_dim).swapaxes(1, 2)
        for query in range(group):
            rows[:, first * group + query : (first + together) * group : group] += added
    return last
