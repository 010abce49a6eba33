"""Gradients of attention in windows that differ by head and query, from what a forward call saved."""

from __future__ import annotations

import numpy as np

from longattn import _core
from longattn._arrays import Array, like
from longattn._checks import batched, dense_inputs
from longattn.dense._options import score_options
from longattn.dense.attention_backward import saved_output, saved_sums
from longattn.sparse._windows import window_ranges


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
) -> tuple[Array, Array, Array]:
    """Gradients of `longattn.sparse.windowed_attention` by queries, keys and values.

    Those of `longattn.dense.attention_backward` over the keys that each query sees.

    Args:
        d_out: gradient of the output, shape and dtype of `out`.
        q: queries, as in the forward call.
        k: keys, as in the forward call.
        v: values, as in the forward call.
        out: the forward call's output.
        lse: the forward call's log-sum-exp, floating.
        radius: as in the forward call; so are the other options, of which sinks are not offered.
        centre: as in the forward call.
        causal: as in the forward call.
        cu_seqlens_q: as in the forward call.
        cu_seqlens_k: as in the forward call.
        d_lse: gradient of the log-sum-exp, floating, shaped as `lse`; `None` is zero.
        scale: as in the forward call.
        softcap: as in the forward call.

    Returns:
        Gradients of `q`, `k` and `v`, in their shapes, dtypes and kinds.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Five matrix products over the windows where the forward call has two. Beside the results at most 32 heads'
        gradients of keys and values in float32, or all of them where there are more heads.
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    rows, keys = qn.shape[-2], kn.shape[-2]
    ranges = window_ranges(qn.shape, keys, radius, centre, causal, cu_seqlens_q, cu_seqlens_k)
    options = score_options(qn.shape, keys, span=rows + keys, scale=scale, softcap=softcap)
    output, single = (*qn.shape[:-1], vn.shape[-1]), np.dtype(np.float32)
    out_n, d_out_n = saved_output(out, "out", output, qn.dtype), saved_output(d_out, "d_out", output, qn.dtype)
    lse3 = batched(saved_sums(lse, "lse", output[:-1], single), 3)
    d_lse3 = None if d_lse is None else batched(saved_sums(d_lse, "d_lse", output[:-1], single), 3)
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (qn, kn, vn))
    if lse3.size:
        d4, q4, k4, v4, o4 = (batched(x, 4) for x in (d_out_n, qn, kn, vn, out_n))
        results = (batched(dq, 4), batched(dk, 4), batched(dv, 4))
        _core.windowed_backward((d4, q4, k4, v4, o4, lse3, d_lse3), results, ranges, options)
    return like(q, dq), like(k, dk), like(v, dv)
