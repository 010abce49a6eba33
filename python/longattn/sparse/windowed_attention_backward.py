"""Gradients of attention in windows that differ by head and query, from what a forward call saved."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn import _core
from longattn._arrays import FLOAT64, Array, like
from longattn._checks import batched, dense_inputs
from longattn.dense._options import score_options
from longattn.dense.attention_backward import attention_backward, saved_output, saved_sums, wants_d_sinks
from longattn.sparse._windows import ranges_mask, window_ranges


def windowed_attention_backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    radius: int | tuple[int, int] | Array,
    centre: Array | None = None,
    causal: bool = False,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    d_lse: Array | None = None,
    scale: float | Array | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
    return_d_sinks: bool = False,
) -> tuple[Array, ...]:
    """Gradients of `longattn.sparse.windowed_attention` by queries, keys, values and sinks.

    Those of `longattn.dense.attention_backward` over the keys that each query sees. Scales are constants.

    Args:
        d_out: gradient of the output, shape and dtype of `out`.
        q: queries, as in the forward call; dtypes as there, float64 included.
        k: keys, as in the forward call.
        v: values, as in the forward call.
        out: the forward call's output.
        lse: the forward call's log-sum-exp, floating.
        radius: as in the forward call.
        centre: as in the forward call.
        causal: as in the forward call.
        cu_seqlens_q: as in the forward call.
        cu_seqlens_k: as in the forward call.
        d_lse: gradient of the log-sum-exp, floating, shaped as `lse`; `None` is zero.
        scale: as in the forward call.
        softcap: as in the forward call.
        sinks: as in the forward call.
        return_d_sinks: also return the gradient of `sinks`.

    Returns:
        Gradients of `q`, `k` and `v`, in their shapes, dtypes and kinds; with `return_d_sinks` that of the sinks
        besides, float32 (float64 for float64) `[Hq]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or `return_d_sinks` without sinks.

    Cost:
        Five matrix products over the windows where the forward call has two. Beside the results at most 32 heads'
        gradients of keys and values in float32, or all of them where there are more heads.
    """
    qn, kn, vn = dense_inputs(q, k, v)
    rows, keys = qn.shape[-2], kn.shape[-2]
    ranges = window_ranges(qn.shape, keys, radius, centre, causal, cu_seqlens_q, cu_seqlens_k)
    wants_sinks = wants_d_sinks(return_d_sinks, sinks)
    if qn.dtype == FLOAT64:
        given: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks, "return_d_sinks": wants_sinks}
        mask = ranges_mask(ranges, qn.shape, keys)
        found: tuple[Array, ...] = attention_backward(d_out, q, k, v, out, lse, d_lse=d_lse, mask=mask, **given)
        return found
    options = score_options(qn.shape, keys, span=rows + keys, scale=scale, softcap=softcap, sinks=sinks)
    output, single = (*qn.shape[:-1], vn.shape[-1]), np.dtype(np.float32)
    out_n, d_out_n = saved_output(out, "out", output, qn.dtype), saved_output(d_out, "d_out", output, qn.dtype)
    lse3 = batched(saved_sums(lse, "lse", output[:-1], single), 3)
    d_lse3 = None if d_lse is None else batched(saved_sums(d_lse, "d_lse", output[:-1], single), 3)
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (qn, kn, vn))
    d_sinks = np.zeros(qn.shape[-3], np.float32) if wants_sinks else None
    if lse3.size:
        d4, q4, k4, v4, o4 = (batched(x, 4) for x in (d_out_n, qn, kn, vn, out_n))
        results = (batched(dq, 4), batched(dk, 4), batched(dv, 4))
        _core.windowed_backward((d4, q4, k4, v4, o4, lse3, d_lse3), results, d_sinks, ranges, options)
    gradients = like(q, dq), like(k, dk), like(v, dv)
    return gradients if d_sinks is None else (*gradients, like(q, d_sinks))
