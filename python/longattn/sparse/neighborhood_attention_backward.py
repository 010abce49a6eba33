"""Gradients of neighbourhood attention, from what a forward call saved."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from longattn._arrays import Array, like
from longattn.dense.attention_backward import attention_backward
from longattn.sparse._grid import (
    attend_backward,
    extra_inputs,
    flat,
    grid_inputs,
    grid_options,
    own_grid,
    per_axis,
    saved_forward,
    table_bias,
    window_axes,
)


class NeighborhoodGradients(NamedTuple):
    """Gradients of `generalized_neighborhood_attention`; those of absent arguments are `None`.

    Attributes:
        dq: as `q`.
        dk: as `k`.
        dv: as `v`.
        d_extra_k: as `extra_k`.
        d_extra_v: as `extra_v`.
        d_bias: float32, as `bias`.
        d_sinks: float32, as `sinks`.
    """

    dq: Array
    dk: Array
    dv: Array
    d_extra_k: Array | None
    d_extra_v: Array | None
    d_bias: Array | None
    d_sinks: Array | None


def neighborhood_attention_backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    d_lse: Array | None = None,
    extra_k: Array | None = None,
    extra_v: Array | None = None,
    bias: Array | None = None,
    scale: float | Array | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
) -> NeighborhoodGradients:
    """Gradients of `generalized_neighborhood_attention` by everything but its scale.

    Those of `longattn.dense.attention_backward`, over the keys that each token sees; that of the bias table sums the
    logits' gradients by distance. A key's gradient sums over all tokens whose window holds it, which near a border
    are more than a window has.

    Args:
        d_out: gradient of the output, shape and dtype of `out`.
        q: queries `[B, Hq, X1.., D]`, as in the forward call.
        k: keys `[B, Hkv, X1.., D]`.
        v: values `[B, Hkv, X1.., Dv]`.
        out: the forward call's output.
        lse: the forward call's log-sum-exp, floating `[B, Hq, X1..]`.
        window: as in the forward call; so are the other options.
        stride: as in the forward call.
        dilation: as in the forward call.
        causal: as in the forward call.
        d_lse: gradient of the log-sum-exp, floating `[B, Hq, X1..]`; `None` is zero.
        extra_k: as in the forward call.
        extra_v: as in the forward call.
        bias: as in the forward call.
        scale: as in the forward call.
        softcap: as in the forward call.
        sinks: as in the forward call.

    Returns:
        The gradients, in the kinds and dtypes of what they are of, those of the bias and the sinks float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Five matrix products where the forward call has two. Beside the results at most 32 heads' gradients of keys and
        values in float32, or all of them where there are more heads.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 8, 8, 16), dtype=np.float32)
        >>> out, lse = la.sparse.generalized_neighborhood_attention(q, k, v, window=3, return_lse=True)
        >>> found = la.sparse.neighborhood_attention_backward(np.ones_like(out), q, k, v, out, lse, window=3)
        >>> bool(np.allclose(found.dv.sum(axis=(2, 3)), 64, rtol=1e-5))  # each token's weights sum to 1
        True
    """
    qn, kn, vn = grid_inputs(q, k, v)
    axes = window_axes(own_grid(qn, kn), window, stride, dilation, causal)
    table = table_bias(bias, qn.shape[1], per_axis(window, "window", len(axes), 1))
    extra = extra_inputs(extra_k, extra_v, qn, kn, vn)
    options = grid_options(qn.shape, scale, softcap, sinks)
    saved = saved_forward(d_out, out, lse, d_lse, (*qn.shape[:-1], vn.shape[-1]), qn.dtype)
    d_bias = None if table is None or table.table is None else np.zeros_like(table.table)
    d_sinks = None if sinks is None else np.zeros(qn.shape[1], np.float32)
    dq, dk, dv = attend_backward(saved, qn, kn, vn, axes, options, bias=table, d_bias=d_bias, d_sinks=d_sinks)
    d_extra_k: Array | None = None
    d_extra_v: Array | None = None
    if extra is not None:
        d_extra_k, d_extra_v = np.zeros_like(extra[0]), np.zeros_like(extra[1])
        if saved[2].size and extra[0].shape[2]:
            # Their part of the softmax is dense attention with the log-sum-exp of the whole.
            factor: Any = options["scale"]
            factor = factor[..., 0] if isinstance(factor, np.ndarray) else factor
            d4, o4 = flat(saved[0]), flat(saved[1])
            lse3, d_lse3 = (None if x is None else x.reshape(*x.shape[:2], -1) for x in saved[2:])
            more, d_extra_k, d_extra_v = attention_backward(
                d4, flat(qn), *extra, o4, lse3, d_lse=d_lse3, scale=factor, softcap=softcap
            )
            dq += more.reshape(dq.shape)
    return NeighborhoodGradients(
        like(q, dq),
        like(k, dk),
        like(v, dv),
        None if d_extra_k is None else like(extra_k, d_extra_k),
        None if d_extra_v is None else like(extra_v, d_extra_v),
        None if d_bias is None else like(bias, d_bias),
        None if d_sinks is None else like(sinks, d_sinks),
    )
