"""Grouped-query attention: several query heads share the keys and values of one KV head."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import (
    attention_inputs,
    check_float_storage,
    check_heads,
    flag,
    integer,
    one_of,
    result_array,
    returned,
)
from longattn.dense._head_options import options_of_heads
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import dense as reference

Conversion = Literal["mean", "first", "random"]


def grouped_query_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    interleaved: bool = False,
    return_lse: bool = False,
    out: Array | None = None,
    **options: Any,
) -> Any:
    """Attention of `Hq` query heads over `Hkv` heads of keys and values, `Hq` a multiple of `Hkv`.

    With `G = Hq / Hkv`, query head `h` reads KV head `h // G`; some checkpoints order their heads so that it reads
    `h % Hkv` (`interleaved`). `Hkv = Hq` is multi-head attention, `Hkv = 1` multi-query attention. Keys and values
    are never repeated: a group's rows go through one pass over its KV head.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        interleaved: query head `h` reads KV head `h % Hkv` instead of `h // G`; keys and values are then arrays, not
            a store's rows of codes.
        return_lse: also return the log-sum-exp of the logits.
        out: array `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) of the kind and dtype of `q` that receives the result.
        options: every other option of `longattn.attention`; what is given per head is per query head.

    Returns:
        As `longattn.attention`: the output in the kind and dtype of `q`, with `return_lse` the pair with lse.

    Raises:
        TypeError: as `longattn.attention`.
        ValueError: as `longattn.attention`, among others where `Hq` is no multiple of `Hkv`.

    Cost:
        Multiply-adds as with `Hq` KV heads; bytes of keys and values read once per group, a `G`-th of that.
        `interleaved` copies nothing; it is one call per KV head over strided views.

    References:
        J. Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
        2023, arXiv:2305.13245.

    Example:
        >>> import numpy as np, longattn as la
        >>> q = np.ones((1, 8, 3, 64), np.float32)
        >>> k = v = np.ones((1, 2, 10, 64), np.float32)
        >>> la.dense.grouped_query_attention(q, k, v, causal=True, interleaved=True).shape
        (1, 8, 3, 64)
    """
    if not flag(interleaved, "interleaved"):
        return attention(q, k, v, return_lse=return_lse, out=out, **options)
    return_lse = flag(return_lse, "return_lse")
    qn, kn, vn = attention_inputs(q, k, v, ranks=(3, 4))
    heads, kv_heads = qn.shape[-3], kn.shape[-3]
    check_heads(heads, kv_heads, vn.shape[-3])
    inputs: dict[str, NDArray[Any] | None] = {"q": qn, "k": kn, "v": vn}
    result = result_array(out, q, (*qn.shape[:-1], vn.shape[-1]), qn.dtype, inputs)
    lse = np.empty(qn.shape[:-1], np.float32)
    for head in range(kv_heads):
        one, group = slice(head, head + 1), slice(head, None, kv_heads)
        _, lse[..., group, :] = attention(
            qn[..., group, :, :],
            kn[..., one, :, :],
            vn[..., one, :, :],
            return_lse=True,
            out=result[..., group, :, :],
            **options_of_heads(options, group, heads),
        )
    return returned(out, q, result, lse if return_lse else None)


def mha_to_gqa(
    wk: Array,
    wv: Array,
    n_kv: int,
    *,
    heads: int | None = None,
    mode: Conversion = "mean",
    seed: int = 0,
) -> tuple[Array, Array]:
    """Key and value projections of `n_kv` heads from those of a multi-head checkpoint.

    Heads are grouped as `grouped_query_attention` groups query heads (`h // G`, `G = H / n_kv`). The model is then
    trained further, which is not done here.

    Args:
        wk: key projection `[H, D, E]`, or `[H * D, E]` with `heads` given; float32, float16 or bfloat16.
        wv: value projection `[H, Dv, E]` or `[H * Dv, E]`, likewise.
        n_kv: KV heads wanted; a divisor of `H`.
        heads: `H`, for projections of rank 2.
        mode: a new head is the mean of its group (`"mean"`, best in the paper), its first head (`"first"`), or
            begins anew (`"random"`): normal numbers as large, in root mean square, as the projection it replaces.
            That size is ours: the paper says no more than that such heads are initialised from scratch.
        seed: seed of `"random"`.

    Returns:
        The two projections with `n_kv` heads, of the rank, kind and dtype of what was given.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or another mode.

    Cost:
        One pass over the projections; sums in float64, rounded once.
    """
    projections = (_by_head(wk, "wk", heads), _by_head(wv, "wv", heads))
    total = projections[0].shape[0]
    if projections[1].shape[0] != total:
        raise ValueError(f"wv: got {projections[1].shape[0]} heads, expected {total} as in wk")
    if isinstance(n_kv, bool) or not isinstance(n_kv, int | np.integer):
        raise TypeError(f"n_kv: got {n_kv!r}, expected an integer")
    if n_kv < 1 or total % n_kv:
        raise ValueError(f"n_kv: got {n_kv}, expected a divisor of the {total} heads of wk")
    one_of(mode, "mode", get_args(Conversion))
    rng = np.random.default_rng(integer(seed, "seed", 0))
    converted = []
    for given, projection in zip((wk, wv), projections, strict=True):
        groups = projection.reshape(n_kv, total // n_kv, *projection.shape[1:])
        if mode == "mean":
            new = groups.mean(axis=1, dtype=np.float64)
        elif mode == "first":
            new = groups[:, 0].copy()
        else:
            size = np.sqrt(np.square(projection, dtype=np.float64).mean())
            new = size * rng.standard_normal((n_kv, *projection.shape[1:]))
        new = new.astype(projection.dtype, copy=False)
        converted.append(like(given, new if heads is None else new.reshape(-1, new.shape[-1])))
    return converted[0], converted[1]


def _by_head(weights: Array, name: str, heads: int | None) -> NDArray[Any]:
    """A projection as `[H, D, E]`."""
    x = as_numpy(weights, name)
    check_float_storage(x, name)
    if heads is None:
        if x.ndim != 3:
            raise ValueError(f"{name}: got shape {x.shape}, expected [H, D, E] (or [H * D, E] and heads)")
        return x
    if isinstance(heads, bool) or not isinstance(heads, int | np.integer):
        raise TypeError(f"heads: got {heads!r}, expected an integer or None")
    if x.ndim != 2 or heads < 1 or x.shape[0] % heads:
        raise ValueError(f"{name}: got shape {x.shape}, expected [H * D, E] with H = {heads}")
    return x.reshape(heads, -1, x.shape[1])


METHOD = Method(
    name="grouped_query_attention",
    family="exact",
    title="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
    year=2023,
    arxiv="2305.13245",
    function=grouped_query_attention,
    reference=reference.grouped_query_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "It equals multi-head attention over keys and values that are repeated for each query head of a group.",
        "As many KV heads as query heads is multi-head attention; one KV head is multi-query attention.",
        "A checkpoint whose heads are equal within each group is not changed by `mha_to_gqa`.",
        "Permuting the query heads of a group permutes the outputs.",
    ),
    tests="tests/dense/test_grouped_query_attention.py",
    cost="Multiply-adds of multi-head attention; each byte of keys and values is read once per group.",
)
