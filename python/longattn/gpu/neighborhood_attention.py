"""Neighbourhood attention on grids, on a GPU: the rule of `longattn.sparse.generalized_neighborhood_attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from longattn._checks import flag, integer
from longattn.gpu._checks import check_fit, heads_view
from longattn.gpu._device import Device, device_of
from longattn.gpu._scores import scores_of
from longattn.gpu.attention import prefill_launch

_AXES = 3
#: log2 of the tokens of a tile along each axis, by the number of axes: 64 in all.
_TILE_BITS = {1: (0, 0, 6), 2: (0, 3, 3), 3: (2, 2, 2)}
_ROWS = 64
_NO_AXIS = (1, 1, 1, 1, 0)


def generalized_neighborhood_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    scale: Any = None,
    softcap: float = 0.0,
    sinks: Any = None,
    return_lse: bool = False,
    device: Device | None = None,
) -> Any:
    """Attention of tokens on a grid to the window of tokens around each, on a GPU.

    Args:
        q: queries `[B, Hq, X1.., D]`, one to three axes, a CuPy array or a torch CUDA tensor; float32, float16 or
            bfloat16; D is 64, 128 or 256.
        k: keys `[B, Hkv, X1.., D]`, dtype of `q`.
        v: values, the shape of `k`.
        window: tokens of a window along each axis, as of `longattn.sparse.generalized_neighborhood_attention`.
        stride: tokens that share a window, likewise.
        dilation: distance between neighbouring tokens of a window, likewise.
        causal: whether tokens behind a token's own are hidden, along each axis, likewise.
        scale: factor on the dot products; `None` is `D ** -0.5`. A float32 array `[Hq]`, or `[B, Hq, L]` with the
            tokens of the grid one after another, has one per head or query.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        sinks: float32 `[Hq]`: a logit per head without a value.
        return_lse: also return the log-sum-exp.
        device: the back end; `None` is that of `q`.

    Returns:
        The output `[B, Hq, X1.., D]` in the kind and dtype of `q`; with `return_lse` the pair with the lse, float32
        `[B, Hq, X1..]`.

    Raises:
        TypeError: arrays of no GPU, or another dtype.
        ValueError: shapes that do not fit, windows that do not fit the grid.
        ImportError: CuPy is not installed.

    Cost: a block takes 64 queries (a line, a square of 8, a cube of 4) and the tiles of as many keys that hold their
        windows. Axes that no single step walks cost a copy.
    """
    device = device or device_of(q, "q")
    shapes = [device.view(x, name).shape for x, name in ((q, "q"), (k, "k"), (v, "v"))]
    grid = shapes[0][2:-1]
    if not 1 <= len(grid) <= _AXES:
        raise ValueError(f"q: got shape {shapes[0]}, expected [B, Hq, X1.., D] with one to {_AXES} axes")
    for shape, name in zip(shapes[1:], "kv", strict=True):
        if shape[2:-1] != grid:
            raise ValueError(f"{name}: got shape {shape}, expected the grid {grid} of q")
    axes = _axes(grid, window, stride, dilation, causal)
    tokens = math.prod(grid)
    queries, keys, values = (
        heads_view(device, _flat(device, x, shape, tokens), name)
        for x, shape, name in zip((q, k, v), shapes, "qkv", strict=True)
    )
    for view, name in ((keys, "k"), (values, "v")):
        if view.dtype != queries.dtype:
            raise TypeError(f"{name}: got dtype {view.dtype}, expected {queries.dtype}")
    check_fit(queries, keys.shape, values.shape)
    scores, _ = scores_of(device, queries.shape, tokens, scale=scale, softcap=softcap, sinks=sinks)
    return_lse = flag(return_lse, "return_lse")
    out, lse = device.empty(shapes[0], queries.dtype, q), device.empty(shapes[0][:-1], "float32", q)
    if math.prod(shapes[0]):
        batch, heads, _, dim = queries.shape
        result = device.view(out, "out")
        kernel, threads, shared = prefill_launch(device, "neighbourhood", queries, _ROWS, options=not scores.plain)
        bits = _TILE_BITS[len(grid)]
        groups = ((-(-axis[0] // axis[3]), axis[3]) for axis in axes)  # the longest's tokens, and how many groups
        tiles = math.prod(gap * -(-count // (1 << bit)) for (count, gap), bit in zip(groups, bits, strict=True))
        arguments = (
            queries.pointer,
            keys.pointer,
            values.pointer,
            result.pointer,
            device.view(lse, "lse").pointer,
            *(np.int64(stride) for view in (queries, keys, values) for stride in view.strides[:3]),
            *(np.int64(stride) for stride in (heads * tokens * dim, tokens * dim, dim)),
            np.int32(heads // keys.shape[1]),
            *(np.int32(n) for axis, bit in zip(axes, bits, strict=True) for n in (*axis, bit)),
            np.float32(scores.factor),
            *scores.arguments(),
        )
        kernel((tiles, heads, batch), (threads,), arguments, shared)
    return (out, lse) if return_lse else out


def _flat(device: Device, x: Any, shape: tuple[int, ...], tokens: int) -> Any:
    """`[B, H, X1.., D]` as `[B, H, tokens, D]`, without a copy where one step walks the axes."""
    if len(shape) == 4:
        return x
    view = device.view(x, "grid")
    inner = zip(view.shape[2:-2], view.strides[2:-2], view.shape[3:-1], view.strides[3:-1], strict=True)
    walks = all(n == 1 or step == m * next_step for n, step, m, next_step in inner)
    return (x if walks else device.contiguous(x)).reshape(*shape[:2], tokens, shape[-1])


def _axes(
    grid: tuple[int, ...], window: object, stride: object, dilation: object, causal: object
) -> list[tuple[int, int, int, int, int]]:
    """Length, window, stride, dilation and causality of three axes."""

    def each(value: object, name: str) -> list[Any]:
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != len(grid):
                raise ValueError(f"{name}: got {len(value)} numbers, expected {len(grid)}, one per axis of the grid")
            return list(value)
        return [value] * len(grid)

    sizes, steps, gaps = (
        [integer(x, name, 1) for x in each(value, name)]
        for value, name in ((window, "window"), (stride, "stride"), (dilation, "dilation"))
    )
    flags = [flag(x, "causal") for x in each(causal, "causal")]
    for a, (length, size, step, gap) in enumerate(zip(grid, sizes, steps, gaps, strict=True)):
        if length and size * gap > length:
            raise ValueError(
                f"window: got {size} with dilation {gap} on axis {a}, expected window * dilation of at most its "
                f"length {length}"
            )
        if step > size:
            raise ValueError(f"stride: got {step} on axis {a}, expected at most the window {size}")
    given = [(*numbers, int(c)) for *numbers, c in zip(grid, sizes, steps, gaps, flags, strict=True)]
    return [_NO_AXIS] * (_AXES - len(grid)) + [(n, w, s, d, c) for n, w, s, d, c in given]
