"""The part of `longattn.torch` that attends over windows of grids and over chosen blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

import longattn as la
from longattn._checks import flag, integer
from longattn._torch_operators import (
    SCORE_ARGUMENTS,
    Given,
    Pair,
    check_constants,
    check_plain,
    check_tensors,
    operator,
    pair_of,
    split_options,
    split_scale,
)
from longattn.sparse import BlockMask
from longattn.sparse._grid import MOST_AXES
from longattn.sparse._halo import table_of_each


def neighborhood_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """`longattn.sparse.generalized_neighborhood_attention` for torch's autograd and `torch.compile`.

    Args:
        q: queries `[B, Hq, X1.., D]`, one to three axes; float32, float16 or bfloat16. May require grad.
        k: keys `[B, Hkv, X1.., D]`; any of the three dtypes. May require grad.
        v: values `[B, Hkv, X1.., Dv]`; dtype of `k`. May require grad.
        window: tokens of a window, one number or one per axis.
        stride: tokens that share a window.
        dilation: distance between neighbouring tokens of a window.
        causal: whether tokens behind a token's own are hidden, along each axis.
        extra_k: keys `[B, Hkv, Lx, D]` that every token sees besides. May require grad.
        extra_v: their values `[B, Hkv, Lx, Dv]`. May require grad.
        bias: floating `[Hq, 2 w1 - 1, ..]`, added to the logits by distance. May require grad.
        scale: factor on the dot products; `None` is `D ** -0.5`; a tensor `[Hq]`, or `[B, Hq, L]` with the tokens of
            the grid one after another, has one per head or query; a constant.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        sinks: floating `[Hq]`: a logit per head without a value. May require grad.
        return_lse: also return the log-sum-exp of the logits, differentiable as well.

    Returns:
        The output `[B, Hq, X1.., Dv]` in the dtype of `q`; with `return_lse`, the pair with the lse, float32
        `[B, Hq, X1..]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, a tensor outside CPU memory, or a scale that requires grad.
        RuntimeError: from a second backward pass: gradients of gradients are not computed.

    Cost:
        Forward and backward as the functions of `longattn.sparse`; what a window sees is computed anew.
    """
    return_lse = flag(return_lse, "return_lse")
    number, factors = split_scale(scale)
    more = {"extra_k": extra_k, "extra_v": extra_v, "bias": bias, "sinks": sinks}
    check_constants({"q": q, "k": k, "v": v, **more}, {"scale": factors})
    axes = max(q.dim() - 3, 1)
    values = (window, stride, dilation, causal)
    rule = {name: _per_axis(x, name, axes) for name, x in zip(RULE, values, strict=True)}
    out, lse = _neighborhood(q=q, k=k, v=v, **rule, **more, scale=number, row_scales=factors, softcap=softcap)
    return (out, lse) if return_lse else out


def halo_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block: int | Sequence[int] = 8,
    halo: int | Sequence[int] = 3,
    relative: Sequence[torch.Tensor] | None = None,
    scale_rel: bool = False,
    mask_pad: bool = True,
    stride: int | Sequence[int] = 1,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`longattn.sparse.halo_attention` for torch's autograd and `torch.compile`.

    Args:
        q: queries `[B, Hq, X1.., D]`, one to three axes; float32, float16 or bfloat16. May require grad.
        k: keys `[B, Hkv, X1.., D]`; any of the three dtypes. May require grad.
        v: values `[B, Hkv, X1.., Dv]`; dtype of `k`. May require grad.
        block: places of a block, one number or one per axis.
        halo: width of the rim, likewise.
        relative: for each axis floating `[2 (block + halo) - 1, D]`: vectors by distance, key less query; `None`: none.
            May require grad.
        scale_rel: multiply the relative part by the scale as well.
        mask_pad: hide what lies outside the grid; else it is zeros.
        stride: only every `stride`-th query of each axis is computed, one number or one per axis; it divides the block.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp of the logits, differentiable as well.

    Returns:
        The output `[B, Hq, ceil(X1 / stride).., Dv]` in the dtype of `q`; with `return_lse`, the pair with the lse,
        float32 without `Dv`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a stride that does not divide the block, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass: gradients of gradients are not computed.

    Cost:
        Forward and backward as the functions of `longattn.sparse`; the relative part is computed anew.
    """
    return_lse = flag(return_lse, "return_lse")
    check_tensors({"q": q, "k": k, "v": v})
    axes = max(q.dim() - 3, 1)
    tables = table_of_each(relative, axes)
    check_tensors({f"relative[{a}]": x for a, x in enumerate(tables or ())}, [f"relative[{a}]" for a in range(axes)])
    given = {"block": block, "halo": halo, "stride": stride}
    rule = {name: _per_axis(x, name, axes) for name, x in given.items()}
    named = dict(zip(RELATIVE, (*(tables or ()), *(None,) * MOST_AXES), strict=False))
    options = {"scale_rel": scale_rel, "mask_pad": mask_pad, "scale": scale}
    out, lse = _halo(q=q, k=k, v=v, **rule, **named, **options)
    return (out, lse) if return_lse else out


def na_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """`longattn.sparse.na_qk` for torch's autograd and `torch.compile`.

    Args:
        q: queries `[B, Hq, X1.., D]`, one to three axes; float32, float16 or bfloat16. May require grad.
        k: keys `[B, Hkv, X1.., D]`; any of the three dtypes. May require grad.
        window: tokens of a window, one number or one per axis.
        dilation: distance between neighbouring tokens of a window.
        causal: whether tokens behind a token's own are hidden, along each axis.
        bias: floating `[Hq, 2 w1 - 1, ..]`, added to the logits by distance. May require grad.
        scale: factor on the dot products; `None` is `D ** -0.5`.

    Returns:
        Logits `[B, Hq, X1.., prod(window)]`, float32; -inf at places behind the token itself on a causal axis.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass: gradients of gradients are not computed.

    Cost:
        Forward and backward as the functions of `longattn.sparse`.
    """
    check_tensors({"q": q, "k": k, "bias": bias})
    logits, _ = _na_qk(q=q, k=k, **_rule_of(q, window, dilation, causal), bias=bias, scale=scale)
    return logits


def na_av(
    weights: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> torch.Tensor:
    """`longattn.sparse.na_av` for torch's autograd and `torch.compile`.

    Args:
        weights: `[B, Hq, X1.., prod(window)]`; float32, float16 or bfloat16. May require grad.
        v: values `[B, Hkv, X1.., Dv]`; any of the three dtypes. May require grad.
        window: as in `na_qk`.
        dilation: as in `na_qk`.
        causal: as in `na_qk`.

    Returns:
        `[B, Hq, X1.., Dv]`, in the dtype of `weights`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass: gradients of gradients are not computed.

    Cost:
        Forward and backward as the functions of `longattn.sparse`.
    """
    check_tensors({"weights": weights, "v": v}, required=("weights", "v"))
    out, _ = _na_av(weights=weights, v=v, **_rule_of(weights, window, dilation, causal))
    return out


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: BlockMask,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    relative_bias: torch.Tensor | None = None,
    relative_zero: int | None = None,
    segments: tuple[torch.Tensor, torch.Tensor] | None = None,
    visible_until: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """`longattn.block_sparse_attention` for torch's autograd and `torch.compile`.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16. May require grad.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes. May require grad.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`. May require grad.
        block_mask: which blocks of keys each block of queries attends to; a constant.
        causal: besides, a query sees only keys at its own position and before.
        window: `(left, right)`: keys that a query sees before and after its position; -1 is unbounded.
        cu_seqlens_q: bounds `[S + 1]` of sequences that a batch of 1 holds one after another; what then is not offered
            is said in `longattn.block_sparse_attention`.
        cu_seqlens_k: bounds of their keys; `None` are those of the queries.
        scale: factor on the dot products; `None` is `D ** -0.5`; a tensor as in `longattn.torch.attention`.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        bias: floating, broadcastable to `[B, Hq, Lq, Lk]`, added to the logits; a constant.
        mask: boolean, broadcastable as `bias`; True lets the query see the key.
        alibi_slopes: floating `[Hq]` or `[B, Hq]`; a constant.
        sinks: floating `[Hq]`: a logit per head without a value. May require grad.
        relative_bias: floating `[Hq, n]`: a bias by distance; a constant.
        relative_zero: the entry of distance 0; `None` is the last.
        segments: pair of integers `[Lq]` or `[B, Lq]` and `[Lk]` or `[B, Lk]`: a query sees only keys of its own
            number.
        visible_until: integers `[Lk]` or `[B, Lk]`: only positions below `visible_until[j]` see key `j`.
        return_lse: also return the log-sum-exp of the logits, differentiable as well.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) in the dtype of `q`; with `return_lse`, the pair with the lse,
        float32 without the last axis.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, a tensor outside CPU memory, or a constant that requires grad.
        RuntimeError: from a second backward pass: gradients of gradients are not computed.

    Cost:
        Forward and backward as the functions of `longattn` and `longattn.sparse`.
    """
    return_lse = flag(return_lse, "return_lse")
    number, factors = split_scale(scale)
    of_queries, of_keys = pair_of(segments, "segments")
    bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    constants = {
        "bias": bias,
        "mask": mask,
        "alibi_slopes": alibi_slopes,
        "relative_bias": relative_bias,
        "visible_until": visible_until,
    }
    named = {"scale": factors, "segments[0]": of_queries, "segments[1]": of_keys, **bounds, **constants}
    check_constants({"q": q, "k": k, "v": v, "sinks": sinks}, named)
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask: got {type(block_mask).__name__}, expected a BlockMask")
    left, right = pair_of(window, "window")
    out, lse = _block_sparse(
        q=q,
        k=k,
        v=v,
        indptr=torch.from_numpy(block_mask.indptr),
        indices=torch.from_numpy(block_mask.indices.astype("int64")),
        shape=[*block_mask.lengths, block_mask.block_q, block_mask.first_q or block_mask.block_q, block_mask.block_k],
        **bounds,
        causal=causal,
        window_left=left,
        window_right=right,
        scale=number,
        row_scales=factors,
        softcap=softcap,
        **constants,
        relative_zero=relative_zero,
        q_segments=of_queries,
        k_segments=of_keys,
        sinks=sinks,
    )
    return (out, lse) if return_lse else out


def windowed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    radius: int | tuple[int, int] | torch.Tensor,
    centre: torch.Tensor | None = None,
    causal: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """`longattn.sparse.windowed_attention` for torch's autograd and `torch.compile`.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, or all of `q`, `k` and `v`
            float64 (slowly). May require grad.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes. May require grad.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`. May require grad.
        radius: keys seen on both sides of the centre: a number, a pair `(left, right)`, or integers `[Hq]` or
            `[Hq, 2]`; a constant, as are the next four.
        centre: integers `[Lq]`, `[Hq, Lq]` or `[B, Hq, Lq]`; `None` is each query's own position.
        causal: a query sees no key behind its own position.
        cu_seqlens_q: bounds `[S + 1]` of sequences that a batch of 1 holds one after another.
        cu_seqlens_k: bounds of their keys; `None` are those of the queries.
        scale: factor on the dot products; `None` is `D ** -0.5`; a tensor as in `longattn.torch.attention`.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        sinks: floating `[Hq]`: a logit per head without a value. May require grad.
        return_lse: also return the log-sum-exp of the logits, differentiable as well.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) in the dtype of `q`; with `return_lse`, the pair with the lse,
        float32 without the last axis.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, a tensor outside CPU memory, or a scale that requires grad.
        RuntimeError: from a second backward pass: gradients of gradients are not computed.

    Cost:
        Forward and backward as the functions of `longattn.sparse`; what a query sees is computed anew.
    """
    return_lse = flag(return_lse, "return_lse")
    number, factors = split_scale(scale)
    given = {"centre": centre, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "sinks": sinks}
    check_constants({"q": q, "k": k, "v": v, **given}, {"scale": factors})
    if isinstance(radius, torch.Tensor):
        check_tensors({"radius": radius})
    check_tensors({"q": q, "k": k, "v": v})
    # Of too few axes, which is for the function to say, as of one head.
    heads = q.shape[-3] if q.dim() >= 3 else 1
    sides = radius if isinstance(radius, torch.Tensor) else torch.tensor(_pair(radius)).expand(heads, 2)
    options = {"causal": causal, "scale": number, "row_scales": factors, "softcap": softcap}
    out, lse = _windowed(q=q, k=k, v=v, radius=sides.contiguous(), **given, **options)
    return (out, lse) if return_lse else out


def _pair(radius: Any) -> tuple[int, int]:
    pair = radius if isinstance(radius, tuple) and len(radius) == 2 else (radius, radius)
    return integer(pair[0], "radius", 0), integer(pair[1], "radius", 0)


def _per_axis(value: Any, name: str, axes: int) -> list[Any]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * axes
    for one in values:
        check_plain(one, name, "bool" if name == "causal" else "SymInt")
    return values


def _rule_of(x: torch.Tensor, window: Any, dilation: Any, causal: Any) -> Given:
    """The rule of a window without strides, one value per axis of the grid that `x` lies on."""
    axes = max(x.dim() - 3, 1)
    given = {"window": window, "dilation": dilation, "causal": causal}
    return {name: _per_axis(value, name, axes) for name, value in given.items()}


def _lse_shapes(x: Given) -> Pair:
    q, v = x["q"], x["v"]
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=sums)


def _scaled(x: Given) -> Given:
    """Arguments with one scale."""
    factors = x.pop("row_scales")
    return x if factors is None else {**x, "scale": factors}


#: The rule of a window.
RULE = ("window", "stride", "dilation", "causal")


def _near(x: Given) -> Given:
    return {name: tuple(value) if name in RULE else value for name, value in x.items()}


def _near_back(d_out: torch.Tensor, d_lse: torch.Tensor, x: Given, results: Any) -> tuple[Any, ...]:
    q, k, v = (x.pop(name) for name in "qkv")
    found = la.sparse.neighborhood_attention_backward(d_out, q, k, v, *results, d_lse=d_lse, **_near(_scaled(x)))
    return found.dq, found.dk, found.dv, found.d_extra_k, found.d_extra_v, found.d_bias, found.d_sinks


_neighborhood = operator(
    "neighborhood_attention",
    "Tensor q, Tensor k, Tensor v, SymInt[] window, SymInt[] stride, SymInt[] dilation, bool[] causal, "
    "Tensor? extra_k, Tensor? extra_v, Tensor? bias, float? scale, Tensor? row_scales, float softcap, Tensor? sinks",
    lambda x: la.sparse.generalized_neighborhood_attention(**_near(_scaled(x)), return_lse=True),
    _near_back,
    _lse_shapes,
    gradients=("q", "k", "v", "extra_k", "extra_v", "bias", "sinks"),
)


#: Relative vectors of the first axis, of the second and of the third.
RELATIVE = tuple(f"relative_{a}" for a in range(MOST_AXES))


def _around(x: Given) -> Given:
    """Arguments with one sequence of relative vectors."""
    tables = [table for name in RELATIVE if (table := x.pop(name)) is not None]
    rule = {name: tuple(x.pop(name)) for name in ("block", "halo", "stride")}
    return {**x, **rule, "relative": tables or None}


def _around_back(d_out: torch.Tensor, d_lse: torch.Tensor, x: Given, results: Any) -> list[Any]:
    q, k, v = (x.pop(name) for name in "qkv")
    found = la.sparse.halo_attention_backward(d_out, q, k, v, *results, d_lse=d_lse, **_around(x))
    tables: Sequence[Any] = found.d_relative or ()
    return [*found[:3], *tables, *(None,) * (MOST_AXES - len(tables))]


def _around_shapes(x: Given) -> Pair:
    q, v = x["q"], x["v"]
    # What does not fit is for the function to say.
    rows = [-(-n // max(step, 1)) for n, step in zip(q.shape[2:-1], x["stride"], strict=False)]
    shape = (*q.shape[:2], *rows)
    return q.new_empty(*shape, v.shape[-1]), q.new_empty(shape, dtype=torch.float32)


_halo = operator(
    "halo_attention",
    "Tensor q, Tensor k, Tensor v, SymInt[] block, SymInt[] halo, SymInt[] stride, "
    f"{', '.join(f'Tensor? {name}' for name in RELATIVE)}, bool scale_rel, bool mask_pad, float? scale",
    lambda x: la.sparse.halo_attention(**_around(x), return_lse=True),
    _around_back,
    _around_shapes,
    gradients=("q", "k", "v", *RELATIVE),
)


def _with_none(result: torch.Tensor) -> Pair:
    """A result as a pair: operators have two."""
    return result, result.new_empty(0)


def _logit_shapes(x: Given) -> Pair:
    q = x["q"]
    return _with_none(q.new_empty(*q.shape[:-1], math.prod(x["window"]), dtype=torch.float32))


def _logits_back(d_scores: torch.Tensor, _: torch.Tensor, x: Given, results: Any) -> list[Any]:
    q, k, has = x.pop("q"), x.pop("k"), x.pop("bias") is not None
    found = la.sparse.na_qk_backward(d_scores, q, k, **_near(x), return_d_bias=has)
    return [*found[:2], found[2] if has else None]


_na_qk = operator(
    "na_qk",
    "Tensor q, Tensor k, SymInt[] window, SymInt[] dilation, bool[] causal, Tensor? bias, float? scale",
    lambda x: _with_none(la.sparse.na_qk(**_near(x))),
    _logits_back,
    _logit_shapes,
    gradients=("q", "k", "bias"),
    reads=lambda x: False,
)


def _sum_shapes(x: Given) -> Pair:
    weights = x["weights"]
    return _with_none(weights.new_empty(*weights.shape[:-1], x["v"].shape[-1]))


_na_av = operator(
    "na_av",
    "Tensor weights, Tensor v, SymInt[] window, SymInt[] dilation, bool[] causal",
    lambda x: _with_none(la.sparse.na_av(**_near(x))),
    lambda d_out, _, x, results: la.sparse.na_av_backward(d_out, **_near(x)),
    _sum_shapes,
    gradients=("weights", "v"),
    reads=lambda x: False,
)


def _blocks(x: Given) -> tuple[list[Any], Given]:
    """Queries, keys, values and the mask, and what else there is."""
    rows, keys, block_q, first_q, block_k = x.pop("shape")
    mask = BlockMask(
        indptr=x.pop("indptr").numpy(),
        indices=x.pop("indices").numpy(),
        lengths=(rows, keys),
        block_q=block_q,
        first_q=first_q,
        block_k=block_k,
    )
    bounds = {name: x.pop(name) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    places, options = split_options(x)
    return [*places, mask], {**bounds, **options}


def _of_blocks(x: Given) -> Any:
    places, options = _blocks(x)
    return la.block_sparse_attention(*places, **options, return_lse=True)


def _of_blocks_back(d_out: torch.Tensor, d_lse: torch.Tensor, x: Given, results: Any) -> list[Any]:
    (q, k, v, mask), options = _blocks(x)
    has = options["sinks"] is not None
    out, lse = results
    found = la.sparse.block_sparse_attention_backward(
        d_out, q, k, v, out, lse, mask, d_lse=d_lse, return_d_sinks=has, **options
    )
    return [*found[:3], found[3] if has else None]


_block_sparse = operator(
    "block_sparse_attention",
    "Tensor q, Tensor k, Tensor v, Tensor indptr, Tensor indices, SymInt[] shape, Tensor? cu_seqlens_q, "
    f"Tensor? cu_seqlens_k, {SCORE_ARGUMENTS}",
    _of_blocks,
    _of_blocks_back,
    _lse_shapes,
    gradients=("q", "k", "v", "sinks"),
)


def _in_windows_back(d_out: torch.Tensor, d_lse: torch.Tensor, x: Given, results: Any) -> list[Any]:
    qkv, options = [x.pop(name) for name in "qkv"], _scaled(x)
    has = options["sinks"] is not None
    found = la.sparse.windowed_attention_backward(d_out, *qkv, *results, d_lse=d_lse, return_d_sinks=has, **options)
    return [*found[:3], found[3] if has else None]


_windowed = operator(
    "windowed_attention",
    "Tensor q, Tensor k, Tensor v, Tensor radius, Tensor? centre, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "bool causal, float? scale, Tensor? row_scales, float softcap, Tensor? sinks",
    lambda x: la.sparse.windowed_attention(**_scaled(x), return_lse=True),
    _in_windows_back,
    _lse_shapes,
    gradients=("q", "k", "v", "sinks"),
)
