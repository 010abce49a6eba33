"""Neighbourhood attention in two halves, between which the weights are the caller's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_float_storage, flag, returned
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._grid import (
    MOST_AXES,
    GridAxis,
    flat,
    grid_inputs,
    grid_options,
    kernel_axes,
    own_grid,
    per_axis,
    table_bias,
    window_axes,
)


def na_qk(
    q: Array,
    k: Array,
    *,
    window: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    bias: Array | None = None,
    scale: float | None = None,
) -> Any:
    """Logits of every token of a grid with the tokens of its window.

    Place `j` of a token's window, counted row by row from the window's start, is entry `j` of the last axis. On a
    causal axis places behind the token itself hold -inf.

    Args:
        q: queries `[B, Hq, X1.., D]`, one to three axes; float32, float16 or bfloat16.
        k: keys `[B, Hkv, X1.., D]`; any of the three dtypes.
        window: tokens of a window along each axis, as in `generalized_neighborhood_attention` with a stride of 1.
        dilation: distance between neighbouring tokens of a window.
        causal: whether tokens behind a token's own are hidden, along each axis.
        bias: floating `[Hq, 2 w1 - 1, ..]`, added to the logits: entry `key - query + w - 1` along each axis.
        scale: factor on the dot products; `None` is `D ** -0.5`.

    Returns:
        Logits `[B, Hq, X1.., prod(window)]`, float32, in the kind of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a window times its dilation that is longer than the axis.

    Cost:
        Half the arithmetic of the fused function, and `4 prod(X) prod(window)` bytes per query head.
    """
    qn, kn, _ = grid_inputs(q, k, k)
    axes = window_axes(own_grid(qn, kn), window, 1, dilation, causal)
    sizes = per_axis(window, "window", len(axes), 1)
    table = table_bias(bias, qn.shape[1], sizes)
    options = grid_options(qn.shape, scale, 0.0, None)
    scores = np.empty((*qn.shape[:-1], math.prod(sizes)), np.float32)
    if scores.size:
        given = None if table is None else table._for_kernel()
        places = [1] * (MOST_AXES - len(sizes)) + list(sizes)
        _core.neighbourhood_scores(flat(qn), flat(kn), flat(scores), kernel_axes(axes), given, places, options)
    return like(q, scores)


def na_av(
    weights: Array,
    v: Array,
    *,
    window: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> Any:
    """Sums of the values of every token's window, with these weights.

    Args:
        weights: `[B, Hq, X1.., prod(window)]`, places as in `na_qk`; float32, float16 or bfloat16. On a causal axis
            weights of places behind the token itself do not count.
        v: values `[B, Hkv, X1.., Dv]`; any of the three dtypes.
        window: as in `na_qk`.
        dilation: likewise.
        causal: likewise.

    Returns:
        `[B, Hq, X1.., Dv]`, in the kind and dtype of `weights`; sums are float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a window times its dilation that is longer than the axis.

    Cost:
        Half the arithmetic of the fused function.
    """
    wn, vn, axes, sizes = weighted_inputs(weights, v, window, dilation, causal)
    result = np.empty((*wn.shape[:-1], vn.shape[-1]), wn.dtype)
    if result.size:
        places = [1] * (MOST_AXES - len(sizes)) + list(sizes)
        _core.neighbourhood_values(flat(wn), flat(vn), flat(result), kernel_axes(axes), places)
    return like(weights, result)


def weighted_inputs(
    weights: Array, v: Array, window: object, dilation: object, causal: object
) -> tuple[NDArray[Any], NDArray[Any], tuple[GridAxis, ...], tuple[int, ...]]:
    """Weights and values of `na_av` that fit each other, the windows along each axis, and their sizes."""
    wn, vn = as_numpy(weights, "weights"), as_numpy(v, "v")
    check_float_storage(wn, "weights")
    check_float_storage(vn, "v")
    if wn.ndim not in (4, 5, 6):
        raise ValueError(f"weights: got shape {wn.shape}, expected rank 4, 5 or 6")
    if vn.ndim != wn.ndim or vn.shape[0] != wn.shape[0]:
        raise ValueError(f"v: got shape {vn.shape}, expected rank {wn.ndim} and batch {wn.shape[0]} as weights")
    if vn.shape[-1] == 0:
        raise ValueError(f"v: got head_dim 0 in shape {vn.shape}, expected at least 1")
    heads, kv_heads = wn.shape[1], vn.shape[1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"weights: got {heads} heads, expected a positive multiple of the {kv_heads} heads of v")
    if vn.shape[2:-1] != wn.shape[2:-1]:
        raise ValueError(f"v: got a grid {vn.shape[2:-1]}, expected {wn.shape[2:-1]} as in weights")
    axes = window_axes(wn.shape[2:-1], window, 1, dilation, causal)
    sizes = per_axis(window, "window", len(axes), 1)
    if wn.shape[-1] != math.prod(sizes):
        raise ValueError(f"weights: got {wn.shape[-1]} places, expected {math.prod(sizes)} of the window {sizes}")
    return wn, vn, axes, sizes


def neighborhood_attention_unfused(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    bias: Array | None = None,
    scale: float | None = None,
    return_weights: bool = False,
) -> Any:
    """Neighbourhood attention by its halves: logits (`na_qk`), their softmax, values (`na_av`).

    For what needs the weights, or another normaliser: call the halves. Without either, the fused
    `generalized_neighborhood_attention` gives the same and keeps nothing of the size of the windows.

    Args:
        q: queries `[B, Hq, X1.., D]`, one to three axes; float32, float16 or bfloat16.
        k: keys `[B, Hkv, X1.., D]`; any of the three dtypes.
        v: values `[B, Hkv, X1.., Dv]`; dtype of `k`.
        window: tokens of a window along each axis.
        dilation: distance between neighbouring tokens of a window.
        causal: whether tokens behind a token's own are hidden, along each axis.
        bias: floating `[Hq, 2 w1 - 1, ..]`, added to the logits.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_weights: also return the weights.

    Returns:
        The output `[B, Hq, X1.., Dv]`, in the kind and dtype of `q`. With `return_weights`, the pair with the weights
        `[B, Hq, X1.., prod(window)]`, float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a window times its dilation that is longer than the axis.

    Cost:
        The arithmetic of the fused function, and twice `4 prod(X) prod(window)` bytes per query head.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 8, 8, 16), dtype=np.float32)
        >>> _, weights = la.sparse.neighborhood_attention_unfused(q, k, v, window=3, return_weights=True)
        >>> weights.shape, bool(np.allclose(weights.sum(-1), 1))
        ((1, 2, 8, 8, 9), True)
    """
    qn, kn, vn = grid_inputs(q, k, v)
    return_weights = flag(return_weights, "return_weights")
    weights = na_qk(qn, kn, window=window, dilation=dilation, causal=causal, bias=bias, scale=scale)
    if weights.size:
        # Every token sees itself, so that no row is all -inf.
        np.subtract(weights, weights.max(axis=-1, keepdims=True), out=weights)
        np.exp(weights, out=weights)
        np.divide(weights, weights.sum(axis=-1, keepdims=True), out=weights)
    result = na_av(weights, vn, window=window, dilation=dilation, causal=causal).astype(qn.dtype, copy=False)
    return returned(None, q, result, weights if return_weights else None)


METHOD = Method(
    name="neighborhood_attention_unfused",
    family="sparse",
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
    year=2024,
    arxiv="2403.04690",
    function=neighborhood_attention_unfused,
    reference=reference.neighborhood_attention_unfused,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "The halves with a softmax between them are the fused function.",
        "Weights of 1 at a token's own place give its value.",
        "A window as long as the axis is dense attention.",
        "A window of 1 gives the values themselves, fused and unfused.",
        "Equal values come out as they are.",
    ),
    tests="tests/sparse/test_neighborhood_attention_unfused.py",
    cost="`2 * prod(X) * prod(window) * (D + Dv)` multiply-adds and `8 * prod(X) * prod(window)` bytes per query head.",
    mask=lambda: seen(
        neighborhood_attention_unfused, *example(144), shape=(12, 12), window=(3, 5), causal=(True, False)
    ),
)
