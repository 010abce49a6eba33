"""Gradients of attention over chosen blocks of keys, from what a forward call saved."""

from __future__ import annotations

import numpy as np

from longattn import _core
from longattn._arrays import Array, like
from longattn._checks import batched, dense_inputs
from longattn.dense._options import score_options
from longattn.dense.attention_backward import saved_output, saved_sums
from longattn.sparse._call import check_fit
from longattn.sparse.block_mask import BlockMask


def block_sparse_attention_backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    block_mask: BlockMask,
    *,
    d_lse: Array | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | Array | None = None,
    softcap: float = 0.0,
) -> tuple[Array, Array, Array]:
    """Gradients of `longattn.block_sparse_attention` by its queries, keys and values.

    Those of `longattn.dense.attention_backward` with the mask that `block_mask` stands for; keys outside it are not
    read, and a key in no list has a gradient of 0.

    Args:
        d_out: gradient of the output, shape and dtype of `out`.
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`, as in the forward call.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`.
        out: the forward call's output.
        lse: the forward call's log-sum-exp, floating `[B, Hq, Lq]`, or `[Hq, Lq]`.
        block_mask: as in the forward call.
        d_lse: gradient of the log-sum-exp, shaped as `lse`; `None` is zero.
        causal: as in the forward call.
        window: as in the forward call.
        scale: as in the forward call.
        softcap: as in the forward call.

    Returns:
        `(dq, dk, dv)`, in the kinds and dtypes of `q`, `k` and `v`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Five matrix products over the blocks where the forward call has two. Beside the results at most 32 heads'
        gradients of keys and values in float32, or all of them where there are more heads.
    """
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask: got {type(block_mask).__name__}, expected a BlockMask")
    qn, kn, vn = dense_inputs(q, k, v)
    if qn.dtype == np.float64:
        raise TypeError("q: got dtype float64, expected float32, float16 or bfloat16")
    check_fit(block_mask, "block_mask", qn.shape, kn.shape)
    options = score_options(
        qn.shape,
        kn.shape[-2],
        span=qn.shape[-2] + kn.shape[-2],
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
    )
    output, single = (*qn.shape[:-1], vn.shape[-1]), np.dtype(np.float32)
    out_n, d_out_n = saved_output(out, "out", output, qn.dtype), saved_output(d_out, "d_out", output, qn.dtype)
    lse3 = batched(saved_sums(lse, "lse", output[:-1], single), 3)
    d_lse3 = None if d_lse is None else batched(saved_sums(d_lse, "d_lse", output[:-1], single), 3)
    gradients = tuple(np.zeros(x.shape, x.dtype) for x in (qn, kn, vn))
    if lse3.size:
        d4, q4, k4, v4, o4, dq4, dk4, dv4 = (batched(x, 4) for x in (d_out_n, qn, kn, vn, out_n, *gradients))
        _core.block_sparse_backward(
            (d4, q4, k4, v4, o4, lse3, d_lse3),
            (dq4, dk4, dv4),
            block_mask._for_kernel(),
            block_mask.key_bounds,
            options,
        )
    dq, dk, dv = gradients
    return like(q, dq), like(k, dk), like(v, dv)
