"""Exact attention over packed sequences of different lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn import _core
from longattn._arrays import Array
from longattn._checks import carried_state, flag, packed_inputs, result_array, returned
from longattn._score_options import PackedScoreOptions
from longattn.dense._options import arrays_of, packed_options, refuse_on_gpu
from longattn.gpu import attention_varlen as attention_varlen_on_gpu
from longattn.gpu import is_on_gpu
from longattn.methods import Method
from longattn.reference import dense as reference


def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | Array | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    relative_bias: Array | None = None,
    relative_zero: int | None = None,
    skip_threshold: float = 0.0,
    state: tuple[Array, Array] | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """`attention` over sequences of different lengths, packed one after the other without padding.

    Sequence `n` has the query rows `cu_seqlens_q[n]` to `cu_seqlens_q[n + 1]` and the key rows
    `cu_seqlens_k[n]` to `cu_seqlens_k[n + 1]`; queries see keys of their own sequence only, aligned
    bottom-right in each.

    Args:
        q: queries `[Tq, Hq, D]`; float32, float16 or bfloat16.
        k: keys `[Tk, Hkv, D]`; any of the three dtypes.
        v: values `[Tk, Hkv, Dv]`; dtype of `k`.
        cu_seqlens_q: integers `[sequences + 1]` that start at 0, never fall, and end at `Tq`.
        cu_seqlens_k: the same for keys, ending at `Tk`.
        causal: as in `attention`, inside each sequence.
        window: as in `attention`, inside each sequence.
        scale: as in `attention`, an array being `[Hq]`.
        softcap: as in `attention`.
        alibi_slopes: floating `[Hq]`, as in `attention`.
        sinks: floating `[Hq]`, as in `attention`.
        relative_bias: floating `[Hq, n]`, as in `attention`, by distances inside each sequence.
        relative_zero: as in `attention`.
        skip_threshold: as in `attention`, inside each sequence.
        state: as in `attention`: `o` floating `[Tq, Hq, Dv]`, `lse` floating `[Hq, Tq]`.
        return_lse: also return the log-sum-exp of the logits.
        out: array `[Tq, Hq, Dv]` of the kind and dtype of `q` that receives the result; must not overlap any
            input.

    Returns:
        The output `[Tq, Hq, Dv]` in the kind and dtype of `q`: `out` itself where it was given. With
        `return_lse`, the pair `(output, lse)`, `lse` float32 `[Hq, Tq]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: as in `attention`, or sequence bounds that do not fit the arrays.

    Cost:
        That of `attention` summed over the sequences; padding costs nothing because there is none.

    Example:
        >>> import numpy as np, longattn as la
        >>> q = k = v = np.ones((5, 2, 4), np.float32)
        >>> la.attention_varlen(q, k, v, np.array([0, 2, 5]), np.array([0, 2, 5]), causal=True).shape
        (5, 2, 4)
    """
    given = PackedScoreOptions(
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        relative_bias=relative_bias,
        relative_zero=relative_zero,
    )
    if is_on_gpu(q):
        refuse_on_gpu([*given, "state"], skip_threshold=skip_threshold, out=out)
        return attention_varlen_on_gpu(q, k, v, cu_seqlens_q, cu_seqlens_k, state=state, return_lse=return_lse, **given)
    qn, kn, vn, cu_q, cu_k = packed_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k)
    options = packed_options(qn.shape, kn.shape[0], skip_threshold=skip_threshold, **given)
    return_lse = flag(return_lse, "return_lse")
    total_q, heads, _ = qn.shape
    shape = (total_q, heads, vn.shape[2])
    if state is not None:
        o, part = carried_state(state, shape, (heads, total_q))
        options["state"] = o.swapaxes(0, 1)[None], part[None]
    inputs = {} if out is None else {"q": qn, "k": kn, "v": vn, **arrays_of(options)}
    result = result_array(out, q, shape, qn.dtype, inputs)

    lse = np.empty((heads, total_q), np.float32)
    if lse.size:
        _core.attention_varlen(qn, kn, vn, result, lse, cu_q, cu_k, options)
    return returned(out, q, result, lse if return_lse else None)


METHOD = Method(
    name="attention_varlen",
    family="exact",
    title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
    year=2022,
    arxiv="2205.14135",
    function=attention_varlen,
    reference=reference.attention_varlen,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "Sequences do not see each other.",
        "Sequences of equal length are a batch of `attention`.",
    ),
    tests="tests/dense/test_varlen.py",
    cost="That of attention, summed over the sequences.",
)
