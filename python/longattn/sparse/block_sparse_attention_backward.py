"""Gradients of attention over chosen blocks of keys, from what a forward call saved."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn import _core
from longattn._arrays import Array, like
from longattn._checks import batched, dense_inputs
from longattn.dense.attention_backward import saved_output, saved_sums, wants_d_sinks
from longattn.sparse._call import check_fit, list_options
from longattn.sparse._lengths import packed_bounds
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
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    return_d_sinks: bool = False,
    **options: Any,
) -> tuple[Array, ...]:
    """Gradients of `longattn.block_sparse_attention` by its queries, keys, values and sinks.

    Those of `longattn.dense.attention_backward` with the mask that `block_mask` stands for; keys outside it are not
    read, and a key in no list has a gradient of 0. Biases, masks, slopes and scales are constants.

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
        cu_seqlens_q: as in the forward call.
        cu_seqlens_k: as in the forward call.
        return_d_sinks: also return the gradient of `sinks`.
        options: those of the forward call, but for `skip_threshold` and `state`: `window`, `scale`, `softcap`, `bias`,
            `mask`, `alibi_slopes`, `sinks`, `relative_bias`, `relative_zero`, `segments` and `visible_until`.

    Returns:
        Gradients of `q`, `k` and `v`, in their shapes, dtypes and kinds; with `return_d_sinks` that of the sinks
        besides, float32 `[Hq]`. The same bits whatever the number of threads.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or `return_d_sinks` without sinks.

    Cost:
        Five matrix products over the blocks where the forward call has two. Beside the results at most 32 heads'
        gradients of keys and values in float32, or all of them where there are more heads.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 256, 16), dtype=np.float32)
        >>> mask = la.BlockMask.from_blocks(np.eye(4, dtype=bool), lengths=(256, 256), block_q=64, block_k=64)
        >>> out, lse = la.block_sparse_attention(q, k, v, mask, return_lse=True)
        >>> dq, dk, dv = la.sparse.block_sparse_attention_backward(np.ones_like(out), q, k, v, out, lse, mask)
        >>> bool(np.allclose(dv.sum(axis=-2), 256, rtol=1e-5))  # each row's weights sum to 1
        True
    """
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask: got {type(block_mask).__name__}, expected a BlockMask")
    qn, kn, vn = dense_inputs(q, k, v)
    if qn.dtype == np.float64:
        raise TypeError("q: got dtype float64, expected float32, float16 or bfloat16")
    check_fit(block_mask, "block_mask", qn.shape, kn.shape)
    for name in ("skip_threshold", "state"):
        if options.get(name):
            raise ValueError(f"{name}: got one, expected none: it has no gradient")
    wants_sinks = wants_d_sinks(return_d_sinks, options.get("sinks"))
    batch, rows, keys = (qn.shape[0] if qn.ndim == 4 else 1), qn.shape[-2], kn.shape[-2]
    sequences = packed_bounds(batch, rows, keys, cu_seqlens_q, cu_seqlens_k)
    given = list_options(qn.shape, keys, sequences is not None, causal=causal, **options)
    output, single = (*qn.shape[:-1], vn.shape[-1]), np.dtype(np.float32)
    out_n, d_out_n = saved_output(out, "out", output, qn.dtype), saved_output(d_out, "d_out", output, qn.dtype)
    lse3 = batched(saved_sums(lse, "lse", output[:-1], single), 3)
    d_lse3 = None if d_lse is None else batched(saved_sums(d_lse, "d_lse", output[:-1], single), 3)
    gradients = tuple(np.zeros(x.shape, x.dtype) for x in (qn, kn, vn))
    d_sinks = np.zeros(qn.shape[-3], np.float32) if wants_sinks else None
    if lse3.size:
        d4, q4, k4, v4, o4, dq4, dk4, dv4 = (batched(x, 4) for x in (d_out_n, qn, kn, vn, out_n, *gradients))
        _core.block_sparse_backward(
            (d4, q4, k4, v4, o4, lse3, d_lse3),
            (dq4, dk4, dv4),
            d_sinks,
            block_mask._for_kernel(),
            block_mask.key_bounds,
            sequences,
            given,
        )
    found = tuple(like(x, d) for x, d in zip((q, k, v), gradients, strict=True))
    return found if d_sinks is None else (*found, like(q, d_sinks))
