"""Exact attention: blocked softmax over all visible keys, for prefill and decode.

Arrays are numpy arrays, torch CPU tensors or other DLPack CPU arrays; CuPy arrays and torch CUDA tensors go to
`longattn.gpu.attention`, with fewer options. They are read where they lie, with any
strides whose last axis is contiguous; another layout costs one copy (`bias` and `mask` may have any). Storage
is float32, float16 or bfloat16, arithmetic float32; or both are float64. Where eight rows of bfloat16 queries share
bfloat16 keys and values and the CPU multiplies pairs of bfloat16, their softmax weights are rounded to bfloat16; with
matrix registers (AMX) so are those of more than eight rows. Registers multiply other dtypes as sums of two or three
bfloat16, which is as exact as float32.
Results have the kind and dtype of `q`, and the same bits whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn import _core
from longattn._arrays import FLOAT64, Array
from longattn._checks import arithmetic, batched, carried_state, dense_inputs, flag, result_array, returned
from longattn._score_options import ScoreOptions
from longattn.dense._options import ON_GPU, arrays_of, refuse_on_gpu, score_options
from longattn.gpu import attention as attention_on_gpu
from longattn.gpu import is_on_gpu
from longattn.methods import Method
from longattn.reference import dense as reference


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | Array | None = None,
    softcap: float = 0.0,
    bias: Array | None = None,
    mask: Array | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    relative_bias: Array | None = None,
    relative_zero: int | None = None,
    segments: tuple[Array, Array] | None = None,
    visible_until: Array | None = None,
    skip_threshold: float = 0.0,
    qk_int8: bool = False,
    state: tuple[Array, Array] | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Softmax attention, `softmax(scale * q @ k^T + bias) @ v`, without ever holding the scores.

    Query head `h` reads KV head `h // (Hq // Hkv)`. Query row `i` sits at position `Lk - Lq + i`: the last
    query row is at the last key (bottom-right alignment), which makes `causal`, `window` and `alibi_slopes`
    right for decode steps and chunked prefill alike. A row that sees no key gives zeros. NaN and infinities
    in visible keys and values propagate, those in masked ones do not.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, or all of `q`, `k` and `v`
            float64: plain code in double precision, 10 to 20 times slower than float32 for many query rows, 40
            times for few.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes, not necessarily that of `q`. Or the
            `keys` of a `KVStore` of codes, `[Hkv, Lk, D]`, which are decoded in registers.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        causal: a query sees only keys at its own position and before.
        window: `(left, right)`: a query at position `p` sees keys `p - left` to `p + right`; -1 is unbounded.
            A sliding window of `w` tokens that counts the query's own is `(w - 1, 0)`.
        scale: factor on the dot products; `None` is `D ** -0.5`. A floating array `[Hq]`, `[Hq, Lq]` or
            `[B, Hq, Lq]` has one factor per head or per query row.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        bias: floating array, broadcastable to `[B, Hq, Lq, Lk]` (`[Hq, Lq, Lk]` for inputs without a batch
            axis), added to the logits after `softcap`; dtypes other than float32 cost a copy. A bias per key
            is `[..., 1, Lk]`: it is read where it lies, for every query row anew.
        mask: boolean array, broadcastable as `bias`; True lets the query see the key.
        alibi_slopes: floating `[Hq]` or `[B, Hq]`; adds `-slope * |query position - key position|`.
        sinks: floating `[Hq]`: one more logit per head, which takes its share of the softmax and adds nothing
            to the output.
        relative_bias: floating `[Hq, n]`: adds `relative_bias[h, clip(key - position + relative_zero, 0, n - 1)]`
            to the logit, so keys beyond either end of the table get its first or last entry.
        relative_zero: the entry of the key at the query's own position; `None` is `n - 1`, which with `causal`
            makes entry `n - 1 - d` that of the key `d` back.
        segments: pair `(q_segments, k_segments)` of integers within int32, `[Lq]` or `[B, Lq]` and `[Lk]` or
            `[B, Lk]`: a query sees only keys of its own number. Hidden scores are computed all the same;
            `attention_varlen` never does, where segments are runs of equal numbers.
        visible_until: integers `[Lk]` or `[B, Lk]`: only positions below `visible_until[j]` see key `j`.
        skip_threshold: `t` in `[0, 1)`; above 0 the result is approximate. A block of keys (128 for up to 8
            query rows of a KV head's group, else 256) is left out where every weight in it is below `t` relative
            to the largest weight met before, for each of the query rows that are computed together; long key
            ranges are cut into pieces of at least 1024 keys, and each piece starts anew. Keys left out count
            neither in the output nor in the lse: with `n` of them, the lse is too low by at most
            `log(1 + n * t)`, and the output off by at most `2 * n * t * max |v|`. Which blocks these are depends
            on the instruction set, not on the number of threads. For float64 none are.
        qk_int8: where a KV head's group has more than 8 query rows, multiply queries and keys rounded to 8 bits, in
            the manner of SageAttention: keys less the mean key of their head, one scale per row of each.
            Approximate: a logit errs by about 1 % of the standard deviation of the logits of random vectors, and
            by at most `scale * sum_d(|q_d| g + |k_d - c_d| f + f g / 2) / 2` with `f` and `g` the two scales
            (largest magnitude over 127). Values and weights stay float32. Fewer rows, float64, and CPUs that
            do not multiply bytes, compute the logits as without it.
        state: pair `(o, lse)` of an earlier part over other keys, which enters the softmax: the result is
            `merge([state, (output, lse)])` without the rounding between. `o` floating `[B, Hq, Lq, Dv]` (or
            `[Hq, Lq, Dv]`), float64 costs a copy; `lse` floating `[B, Hq, Lq]` (or `[Hq, Lq]`). Rows with
            an lse of -inf count as nothing, whatever their `o` holds. At most one part may have `sinks`.
        return_lse: also return the log-sum-exp of the logits.
        out: array `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) of the kind and dtype of `q` that receives the
            result; must not overlap any input.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`: `out` itself where it
        was given. With `return_lse`, the pair `(output, lse)`, `lse` float32 (float64 for float64) `[B, Hq, Lq]`
        (or `[Hq, Lq]`) by natural logarithm, `sinks` and `state` included, and -inf where there is neither a
        visible key nor those.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes, lengths or values that do not fit, an array outside CPU memory, a tensor that
            requires grad, or an unfit `out`.

    Cost:
        `Hq * Lq * visible keys * (D + Dv)` multiply-adds; each K/V byte is read once per block of queries and
        once for a whole query group. Memory beyond the output: float32 partial results, no scores.

    On arrays of a GPU, `bias`, `alibi_slopes`, `sinks`, `relative_bias`, `state` and an array for `scale` must be
    float32 arrays there, `segments` and `visible_until` int32; `skip_threshold`, `qk_int8` and `out` are not offered.

    Example:
        >>> import numpy as np, longattn as la
        >>> rng = np.random.default_rng(0)
        >>> q = rng.standard_normal((1, 8, 1, 64), dtype=np.float32)
        >>> k, v = rng.standard_normal((2, 1, 2, 1000, 64), dtype=np.float32)
        >>> out, lse = la.attention(q, k, v, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        ((1, 8, 1, 64), (1, 8, 1))
    """
    given = ScoreOptions(
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        relative_bias=relative_bias,
        relative_zero=relative_zero,
        segments=segments,
        visible_until=visible_until,
    )
    if is_on_gpu(q):
        refuse_on_gpu(ON_GPU, skip_threshold=skip_threshold, qk_int8=qk_int8, out=out)
        return attention_on_gpu(q, k, v, state=state, return_lse=return_lse, **given)
    qn, kn, vn = dense_inputs(q, k, v, codes=True)
    keys, dtype = kn.shape[-2], arithmetic(qn)
    options = score_options(
        qn.shape, keys, span=qn.shape[-2] + keys, dtype=dtype, skip_threshold=skip_threshold, **given
    )
    return_lse = flag(return_lse, "return_lse")
    shape = (*qn.shape[:-1], vn.shape[-1])
    if flag(qk_int8, "qk_int8"):
        options["qk_int8"] = True
    double = dtype == FLOAT64
    if state is not None:
        o, part = carried_state(state, shape, shape[:-1], dtype)
        options["state"] = batched(o, 4), batched(part[..., None], 4) if double else batched(part, 3)
    inputs = {} if out is None else {"q": qn, "k": kn, "v": vn, **arrays_of(options)}
    result = result_array(out, q, shape, qn.dtype, inputs)

    lse = np.empty(shape[:-1], dtype)
    if lse.size:
        q4, k4, v4, out4 = (batched(x, 4) for x in (qn, kn, vn, result))
        if double:
            flat, sums = _core.attention_double(q4, k4, v4, options)
            out4[...], lse[...] = flat.reshape(out4.shape), sums.reshape(lse.shape)
        else:
            _core.attention(q4, k4, v4, out4, batched(lse, 3), options)
    return returned(out, q, result, lse if return_lse else None)


METHOD = Method(
    name="attention",
    family="exact",
    title="Attention Is All You Need",
    year=2017,
    arxiv="1706.03762",
    function=attention,
    reference=reference.attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    dtypes=("float32", "float16", "bfloat16", "float64"),
    checks=(
        "Query heads of a group give what they give over repeated keys and values.",
        "A window is the mask that it stands for.",
        "Results over parts of the keys merge to the whole.",
        "Decode steps give the rows of the prefill.",
    ),
    tests="tests/dense/test_attention.py",
    cost="`Hq * Lq * visible keys * (D + Dv)` multiply-adds; each byte of keys and values is read once per group.",
)
