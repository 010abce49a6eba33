"""Gradients of exact attention, from what a forward call saved.

No weights are stored: blocks of them are made anew from the log-sum-exp (Dao et al., FlashAttention: Fast and
Memory-Efficient Exact Attention with IO-Awareness, 2022, arXiv 2205.14135). `longattn.torch` makes them part of
torch's autograd.
"""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import FLOAT64, Array, as_numpy, like
from longattn._checks import arithmetic, batched, check_floating, dense_inputs, flag, packed_inputs
from longattn._score_options import PackedScoreOptions, ScoreOptions
from longattn.dense._options import packed_options, score_options
from longattn.methods import Method
from longattn.reference import dense as reference


def attention_backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    d_lse: Array | None = None,
    return_d_sinks: bool = False,
    **options: Unpack[ScoreOptions],
) -> Any:
    """Gradients of `longattn.attention` by its queries, keys, values and sink logits.

    With `p` the weights and `delta = sum(d_out * out) - d_lse` of each row, `ds = p * (d_out @ v^T - delta)`
    times the derivative of `softcap`; then `dq = scale * ds @ k`, `dk = scale * ds^T @ q`, `dv = p^T @ d_out`,
    the latter two summed over the query group, and `d_sinks = -sum(exp(sink - lse) * delta)`. Biases, masks,
    slopes and scales are constants. A row that sees no key has no part in any gradient. NaN and infinities
    reach the gradients of what sees them. A forward call with a `state` has these gradients too, from its own
    output and lse; one with a `skip_threshold` or `qk_int8` has none.

    Args:
        d_out: gradient of the output, shape and dtype of `out`.
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`, as in the forward call; dtypes as there, float64 included.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`.
        out: the forward call's output.
        lse: the forward call's log-sum-exp, floating `[B, Hq, Lq]` (or `[Hq, Lq]`).
        d_lse: gradient of the log-sum-exp, floating, shape of `lse`; `None` is zero.
        return_d_sinks: also return the gradient of `sinks`.
        options: `causal`, `window`, `scale`, `softcap`, `bias`, `mask`, `alibi_slopes`, `sinks`, `relative_bias`,
            `relative_zero`, `segments` and `visible_until` as in the forward call.

    Returns:
        `(dq, dk, dv)` in the shapes and dtypes of `q`, `k` and `v` and the kind of `q`; with `return_d_sinks`
        `(dq, dk, dv, d_sinks)`, `d_sinks` float32 (float64 for float64) `[Hq]`. The same bits whatever the
        number of threads.

    Raises:
        TypeError: an argument of another kind or dtype, or an option that does not exist.
        ValueError: shapes, lengths or values that do not fit, an array outside CPU memory, a tensor that
            requires grad, or `return_d_sinks` without `sinks`.

    Cost:
        Five matrix products where the forward call has two: `Hq * Lq * visible keys * (3 D + 2 Dv)`
        multiply-adds; float64 takes about 10 times as long as float32. Memory beyond the results: a float32 copy
        of `dq`, no scores.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 100, 16), dtype=np.float32)
        >>> out, lse = la.attention(q, k, v, causal=True, return_lse=True)
        >>> dq, dk, dv = la.dense.attention_backward(np.ones_like(out), q, k, v, out, lse, causal=True)
        >>> bool(np.allclose(dv.sum(axis=-2), 100, rtol=1e-5))  # each row's weights sum to 1
        True
    """
    qn, kn, vn = dense_inputs(q, k, v)
    dtype, keys = arithmetic(qn), kn.shape[-2]
    checked = score_options(qn.shape, keys, span=qn.shape[-2] + keys, dtype=dtype, **options)
    output = (*qn.shape[:-1], vn.shape[-1])
    out_n, d_out_n = saved_output(out, "out", output, qn.dtype), saved_output(d_out, "d_out", output, qn.dtype)
    lse_n, d_lse_n = saved_sums(lse, "lse", qn.shape[:-1], dtype), None
    if d_lse is not None:
        d_lse_n = saved_sums(d_lse, "d_lse", qn.shape[:-1], dtype)
    wants_sinks = wants_d_sinks(return_d_sinks, options.get("sinks"))

    d4, q4, k4, v4, o4 = (batched(x, 4) for x in (d_out_n, qn, kn, vn, out_n))
    gradients: tuple[NDArray[Any], ...]
    if qn.dtype == FLOAT64:
        flat = None if d_lse_n is None else d_lse_n.ravel()
        *found, d_sinks = _core.attention_backward_double(d4, q4, k4, v4, o4, lse_n.ravel(), flat, checked)
        gradients = tuple(x.reshape(whose.shape) for x, whose in zip(found, (qn, kn, vn), strict=True))
        return _returned(q, gradients, d_sinks if wants_sinks else None)
    dq, dk, dv = (np.empty(x.shape, x.dtype) for x in (qn, kn, vn))
    target = np.empty(qn.shape[-3], np.float32) if wants_sinks else None
    lse3, d_lse3 = batched(lse_n, 3), None if d_lse_n is None else batched(d_lse_n, 3)
    arrays = (d4, q4, k4, v4, o4, lse3, d_lse3)
    _core.attention_backward(arrays, (batched(dq, 4), batched(dk, 4), batched(dv, 4)), target, checked)
    return _returned(q, (dq, dk, dv), target)


def attention_varlen_backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    d_lse: Array | None = None,
    return_d_sinks: bool = False,
    **options: Unpack[PackedScoreOptions],
) -> Any:
    """Gradients of `longattn.attention_varlen`: `attention_backward` of each packed sequence.

    Args:
        d_out: gradient of the output, shape and dtype of `out`.
        q: queries `[Tq, Hq, D]`, as in the forward call; float32, float16 or bfloat16.
        k: keys `[Tk, Hkv, D]`.
        v: values `[Tk, Hkv, Dv]`.
        out: the forward call's output.
        lse: the forward call's log-sum-exp, floating `[Hq, Tq]`.
        cu_seqlens_q: as in the forward call.
        cu_seqlens_k: as in the forward call.
        d_lse: gradient of the log-sum-exp, floating `[Hq, Tq]`; `None` is zero.
        return_d_sinks: also return the gradient of `sinks`, summed over the sequences.
        options: `causal`, `window`, `scale`, `softcap`, `alibi_slopes`, `sinks`, `relative_bias` and `relative_zero` as
            in the forward call.

    Returns:
        `(dq, dk, dv)` or `(dq, dk, dv, d_sinks)`, as `attention_backward`.

    Raises:
        TypeError: as in `attention_backward`.
        ValueError: as in `attention_backward`, or sequence bounds that do not fit the arrays.

    Cost:
        That of `attention_backward` summed over the sequences.
    """
    qn, kn, vn, bounds_q, bounds_k = packed_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k)
    checked = packed_options(qn.shape, kn.shape[0], **options)
    total_q, heads, _ = qn.shape
    output, sums = (total_q, heads, vn.shape[-1]), (heads, total_q)
    out_n, d_out_n = saved_output(out, "out", output, qn.dtype), saved_output(d_out, "d_out", output, qn.dtype)
    lse_n = saved_sums(lse, "lse", sums, np.dtype(np.float32))
    d_lse_n = None if d_lse is None else batched(saved_sums(d_lse, "d_lse", sums, np.dtype(np.float32)), 3)
    wants_sinks = wants_d_sinks(return_d_sinks, options.get("sinks"))

    dq, dk, dv = (np.empty(x.shape, x.dtype) for x in (qn, kn, vn))
    d_sinks = np.empty(heads, np.float32) if wants_sinks else None
    arrays = (d_out_n, qn, kn, vn, out_n, batched(lse_n, 3), d_lse_n)
    _core.attention_varlen_backward(arrays, (dq, dk, dv), d_sinks, bounds_q, bounds_k, checked)
    return _returned(q, (dq, dk, dv), d_sinks)


def _returned(q: Array, gradients: tuple[NDArray[Any], ...], d_sinks: NDArray[Any] | None) -> tuple[Array, ...]:
    results = gradients if d_sinks is None else (*gradients, d_sinks)
    return tuple(like(q, x) for x in results)


def saved_output(x: Array, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    a = as_numpy(x, name)
    if a.shape != shape:
        raise ValueError(f"{name}: got shape {a.shape}, expected {shape}")
    if a.dtype != dtype:
        raise TypeError(f"{name}: got dtype {a.dtype}, expected {dtype} as q")
    return a


def saved_sums(x: Array, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    a = as_numpy(x, name)
    check_floating(a, name)
    if a.shape != shape:
        raise ValueError(f"{name}: got shape {a.shape}, expected {shape}")
    return np.ascontiguousarray(a, dtype)


def wants_d_sinks(return_d_sinks: object, sinks: Array | None) -> bool:
    wanted = flag(return_d_sinks, "return_d_sinks")
    if wanted and sinks is None:
        raise ValueError("return_d_sinks: got True without sinks, expected the sinks of the forward call")
    return wanted


METHOD = Method(
    name="attention_backward",
    family="exact",
    title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
    year=2022,
    arxiv="2205.14135",
    function=attention_backward,
    reference=reference.attention_backward,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    dtypes=("float32", "float16", "bfloat16", "float64"),
    checks=(
        "Gradients of keys and values that several heads share are sums over those heads.",
        "Each row's weights sum to 1: with an output gradient of ones, so do those of the values.",
        "Gradients through merged parts are those of the whole.",
        "Gradients of packed sequences are those of each sequence.",
    ),
    tests="tests/dense/test_attention_backward.py",
    cost="`Hq * Lq * visible keys * (3 D + 2 Dv)` multiply-adds; memory linear in the lengths.",
)
