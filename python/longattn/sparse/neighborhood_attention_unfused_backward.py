"""Gradients of the halves of neighbourhood attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_floating, flag, scale_factor
from longattn.dense.attention_backward import saved_output
from longattn.sparse._grid import (
    MOST_AXES,
    GridAxis,
    GridBias,
    flat,
    grid_inputs,
    kernel_axes,
    own_grid,
    per_axis,
    window_axes,
)
from longattn.sparse.neighborhood_attention_unfused import na_av, na_qk, weighted_inputs


def na_qk_backward(
    d_scores: Array,
    q: Array,
    k: Array,
    *,
    window: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    return_d_bias: bool = False,
) -> tuple[Array, ...]:
    """Gradients of `na_qk` by queries, keys and biases.

    A key's gradient sums over all tokens whose window holds it, which near a border are more than a window has. On a
    causal axis gradients of places behind the token itself do not count.

    Args:
        d_scores: gradient of the logits, floating `[B, Hq, X1.., prod(window)]`.
        q: queries `[B, Hq, X1.., D]`, as in the forward call.
        k: keys `[B, Hkv, X1.., D]`.
        window: as in the forward call; so are the next three.
        dilation: as in the forward call.
        causal: as in the forward call.
        scale: as in the forward call.
        return_d_bias: also return the gradient of `bias`, which the others do not depend on.

    Returns:
        Gradients of `q` and `k`, in their shapes, dtypes and kinds; with `return_d_bias` that of the bias besides,
        float32 `[Hq, 2 w1 - 1, ..]`. The same bits whatever the number of threads.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a window times its dilation that is longer than the axis.

    Cost:
        Twice the arithmetic of the forward call. Beside the results at most 32 heads' gradients of keys in float32, or
        all of them where there are more heads.
    """
    qn, kn, _ = grid_inputs(q, k, k)
    axes = window_axes(own_grid(qn, kn), window, 1, dilation, causal)
    sizes = per_axis(window, "window", len(axes), 1)
    given = as_numpy(d_scores, "d_scores")
    check_floating(given, "d_scores")
    if given.shape != (*qn.shape[:-1], math.prod(sizes)):
        raise ValueError(f"d_scores: got shape {given.shape}, expected {(*qn.shape[:-1], math.prod(sizes))}")
    factor, return_d_bias = scale_factor(scale, qn.shape[-1]), flag(return_d_bias, "return_d_bias")
    d_scores32 = _rounded(given, np.dtype(np.float32))
    dq = na_av(d_scores32, kn, window=window, dilation=dilation, causal=causal)
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(dq, np.float32(factor), out=dq)
    table = None
    if return_d_bias:
        table = np.zeros((qn.shape[1], *(2 * w - 1 for w in sizes)), np.float32)
    dk = _spread(d_scores32, qn, kn, axes, sizes, factor, table)
    gradients = like(q, _rounded(dq, qn.dtype)), like(k, dk)
    return gradients if table is None else (*gradients, like(q, table))


def na_av_backward(
    d_out: Array,
    weights: Array,
    v: Array,
    *,
    window: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> tuple[Array, Array]:
    """Gradients of `na_av` by weights and values.

    A value's gradient sums over all tokens whose window holds it, which near a border are more than a window has.

    Args:
        d_out: gradient of the output `[B, Hq, X1.., Dv]`, dtype of `weights`.
        weights: `[B, Hq, X1.., prod(window)]`, as in the forward call.
        v: values `[B, Hkv, X1.., Dv]`.
        window: as in the forward call; so are the next two.
        dilation: as in the forward call.
        causal: as in the forward call.

    Returns:
        Gradients of `weights` and `v`, in their shapes, dtypes and kinds, 0 for weights that do not count. The same
        bits whatever the number of threads.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a window times its dilation that is longer than the axis.

    Cost:
        Twice the arithmetic of the forward call. Beside the results at most 32 heads' gradients of values in float32,
        or all of them where there are more heads.

    Example:
        >>> import numpy as np, longattn as la
        >>> weights = np.full((1, 2, 8, 8, 9), 1 / 9, np.float32)
        >>> v = np.random.default_rng(0).standard_normal((1, 2, 8, 8, 16), dtype=np.float32)
        >>> out = la.sparse.na_av(weights, v, window=3)
        >>> d_weights, dv = la.sparse.na_av_backward(np.ones_like(out), weights, v, window=3)
        >>> bool(np.allclose(dv.sum(axis=(2, 3)), 64, rtol=1e-5))  # each token's weights sum to 1
        True
    """
    wn, vn, axes, sizes = weighted_inputs(weights, v, window, dilation, causal)
    d_out_n = saved_output(d_out, "d_out", (*wn.shape[:-1], vn.shape[-1]), wn.dtype)
    d_weights = na_qk(d_out_n, vn, window=window, dilation=dilation, causal=causal, scale=1.0)
    _hide(d_weights, axes, sizes)
    dv = _spread(wn, d_out_n, vn, axes, sizes, 1.0)
    return like(weights, _rounded(d_weights, wn.dtype)), like(v, dv)


def _spread(
    weights: NDArray[Any],
    rows: NDArray[Any],
    keys: NDArray[Any],
    axes: tuple[GridAxis, ...],
    sizes: tuple[int, ...],
    factor: float,
    table: NDArray[np.float32] | None = None,
) -> NDArray[Any]:
    """`factor` times the weighted sum of the rows of all tokens that see a key, shaped as `keys`; sums of weights."""
    found = np.zeros(keys.shape, keys.dtype)
    if rows.size:
        bias = None if table is None else GridBias(table.shape[1:], tuple(w - 1 for w in sizes))
        places = [1] * (MOST_AXES - len(sizes)) + list(sizes)
        _core.neighbourhood_spread(
            flat(weights),
            flat(rows),
            flat(found),
            None if table is None else table.reshape(-1),
            kernel_axes(axes),
            None if bias is None else bias._for_kernel(),
            places,
            factor,
        )
    return found


def _rounded(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Contiguous, in another dtype. What that does not hold is infinite, as in the core: scaled losses count on it."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, dtype)


def _hide(d_weights: NDArray[np.float32], axes: tuple[GridAxis, ...], sizes: tuple[int, ...]) -> None:
    """Zeros for places beyond a window."""
    whole = d_weights.reshape(*d_weights.shape[:-1], *sizes)
    for a, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        beyond = np.arange(size) >= (axis.intervals[:, 2] - axis.intervals[:, 1])[:, None]
        if beyond.any():
            shape = [1] * whole.ndim
            shape[2 + a], shape[2 + len(sizes) + a] = beyond.shape
            np.copyto(whole, 0, where=beyond.reshape(shape))
