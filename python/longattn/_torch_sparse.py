"""The part of `longattn.torch` that attends over windows of grids and over chosen blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import longattn as la
from longattn._checks import integer
from longattn.sparse import BlockMask


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
    scale: float | None = None,
    softcap: float = 0.0,
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
        scale: factor on the dot products; `None` is `D ** -0.5`.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        return_lse: also return the log-sum-exp of the logits, differentiable as well.

    Returns:
        The output `[B, Hq, X1.., Dv]` in the dtype of `q`; with `return_lse`, the pair with the lse, float32
        `[B, Hq, X1..]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass: gradients of gradients are not computed.

    Cost:
        Forward and backward as the functions of `longattn.sparse`; what a window sees is computed anew.
    """
    check_tensors({"q": q, "k": k, "v": v, "extra_k": extra_k, "extra_v": extra_v, "bias": bias})
    axes = max(q.dim() - 3, 1)
    rule = tuple(_per_axis(x, axes) for x in (window, stride, dilation, causal))
    out, lse = _neighborhood(q, k, v, *rule, extra_k, extra_v, bias, scale, softcap)
    return (out, lse) if return_lse else out


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: BlockMask,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
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
        scale: factor on the dot products; `None` is `D ** -0.5`.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        return_lse: also return the log-sum-exp of the logits, differentiable as well.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) in the dtype of `q`; with `return_lse`, the pair with the lse,
        float32 without the last axis.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass: gradients of gradients are not computed.

    Cost:
        Forward and backward as the functions of `longattn` and `longattn.sparse`.
    """
    check_tensors({"q": q, "k": k, "v": v})
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask: got {type(block_mask).__name__}, expected a BlockMask")
    lists = torch.from_numpy(block_mask.indptr), torch.from_numpy(block_mask.indices.astype("int64"))
    shape = [*block_mask.lengths, block_mask.block_q, block_mask.first_q or block_mask.block_q, block_mask.block_k]
    out, lse = _block_sparse(q, k, v, *lists, shape, causal, window[0], window[1], scale, softcap)
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
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """`longattn.sparse.windowed_attention` for torch's autograd and `torch.compile`.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16. May require grad.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes. May require grad.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`. May require grad.
        radius: keys seen on both sides of the centre: a number, a pair `(left, right)`, or integers `[Hq]` or
            `[Hq, 2]`; a constant, as are the next four.
        centre: integers `[Lq]`, `[Hq, Lq]` or `[B, Hq, Lq]`; `None` is each query's own position.
        causal: a query sees no key behind its own position.
        cu_seqlens_q: bounds `[S + 1]` of sequences that a batch of 1 holds one after another.
        cu_seqlens_k: bounds of their keys; `None` are those of the queries.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        return_lse: also return the log-sum-exp of the logits, differentiable as well.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) in the dtype of `q`; with `return_lse`, the pair with the lse,
        float32 without the last axis.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass: gradients of gradients are not computed.

    Cost:
        Forward and backward as the functions of `longattn.sparse`; what a query sees is computed anew.
    """
    given = {"centre": centre, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    check_tensors({"q": q, "k": k, "v": v, **given})
    sides = radius if isinstance(radius, torch.Tensor) else torch.tensor(_pair(radius)).expand(q.shape[-3], 2)
    out, lse = _windowed(q, k, v, sides.contiguous(), *given.values(), causal, scale, softcap)
    return (out, lse) if return_lse else out


def _pair(radius: Any) -> tuple[int, int]:
    pair = radius if isinstance(radius, tuple) and len(radius) == 2 else (radius, radius)
    return integer(pair[0], "radius", 0), integer(pair[1], "radius", 0)


def check_tensors(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Kinds and devices; `q`, `k` and `v` must be there."""
    for name, x in tensors.items():
        if x is None and name not in ("q", "k", "v"):
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a torch tensor")
        if x.device.type != "cpu":
            raise ValueError(
                f"{name}: got a tensor on device {x.device}, expected a CPU tensor: pass tensor.cpu(), or use "
                "torch.nn.functional.scaled_dot_product_attention there"
            )


def _per_axis(value: Any, axes: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * axes


def _mask(indptr: torch.Tensor, indices: torch.Tensor, shape: Sequence[int]) -> BlockMask:
    rows, keys, block_q, first_q, block_k = shape
    return BlockMask(
        indptr=indptr.numpy(),
        indices=indices.numpy(),
        lengths=(rows, keys),
        block_q=block_q,
        first_q=first_q,
        block_k=block_k,
    )


@torch.library.custom_op("longattn::neighborhood_attention", mutates_args=(), device_types="cpu")
def _neighborhood(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    extra_k: torch.Tensor | None,
    extra_v: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float | None,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = la.sparse.generalized_neighborhood_attention(
        q,
        k,
        v,
        window=tuple(window),
        stride=tuple(stride),
        dilation=tuple(dilation),
        causal=tuple(causal),
        extra_k=extra_k,
        extra_v=extra_v,
        bias=bias,
        scale=scale,
        softcap=softcap,
        return_lse=True,
    )
    return out, lse


@torch.library.custom_op("longattn::neighborhood_attention_backward", mutates_args=(), device_types="cpu")
def _neighborhood_backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    extra_k: torch.Tensor | None,
    extra_v: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float | None,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    found = la.sparse.neighborhood_attention_backward(
        d_out,
        q,
        k,
        v,
        out,
        lse,
        d_lse=d_lse,
        window=tuple(window),
        stride=tuple(stride),
        dilation=tuple(dilation),
        causal=tuple(causal),
        extra_k=extra_k,
        extra_v=extra_v,
        bias=bias,
        scale=scale,
        softcap=softcap,
    )
    # Operators have one number of results: gradients of what is absent are empty.
    none = q.new_empty(0)
    d_extra_k, d_extra_v = (q.new_empty(0) if x is None else x for x in (found.d_extra_k, found.d_extra_v))
    d_bias = none if bias is None or found.d_bias is None else found.d_bias.to(bias.dtype)
    return found.dq, found.dk, found.dv, d_extra_k, d_extra_v, d_bias


@torch.library.custom_op("longattn::block_sparse_attention", mutates_args=(), device_types="cpu")
def _block_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    shape: Sequence[int],
    causal: bool,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    mask, window = _mask(indptr, indices, shape), (window_left, window_right)
    out, lse = la.block_sparse_attention(
        q, k, v, mask, causal=causal, window=window, scale=scale, softcap=softcap, return_lse=True
    )
    return out, lse


@torch.library.custom_op("longattn::block_sparse_attention_backward", mutates_args=(), device_types="cpu")
def _block_sparse_backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    shape: Sequence[int],
    causal: bool,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask, window = _mask(indptr, indices, shape), (window_left, window_right)
    return la.sparse.block_sparse_attention_backward(
        d_out, q, k, v, out, lse, mask, d_lse=d_lse, causal=causal, window=window, scale=scale, softcap=softcap
    )


@torch.library.custom_op("longattn::windowed_attention", mutates_args=(), device_types="cpu")
def _windowed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    radius: torch.Tensor,
    centre: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = la.sparse.windowed_attention(
        q,
        k,
        v,
        radius=radius,
        centre=centre,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        causal=causal,
        scale=scale,
        softcap=softcap,
        return_lse=True,
    )
    return out, lse


@torch.library.custom_op("longattn::windowed_attention_backward", mutates_args=(), device_types="cpu")
def _windowed_backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    radius: torch.Tensor,
    centre: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return la.sparse.windowed_attention_backward(
        d_out,
        q,
        k,
        v,
        out,
        lse,
        radius=radius,
        centre=centre,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        d_lse=d_lse,
        causal=causal,
        scale=scale,
        softcap=softcap,
    )


# Shapes and dtypes of the results, for tensors without memory.


def _fake_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


_neighborhood.register_fake(_fake_attention)
_block_sparse.register_fake(_fake_attention)
_windowed.register_fake(_fake_attention)


@_neighborhood_backward.register_fake
def _(
    d_out: torch.Tensor, d_lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    others = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in rest[-5:-2])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *others


@_block_sparse_backward.register_fake
@_windowed_backward.register_fake
def _(
    d_out: torch.Tensor, d_lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# Gradients.


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Saves tensors as tensors and the rest as it is, to be put together again in the order of the arguments."""
    given = (*inputs[:3], *output, *inputs[3:])
    ctx.save_for_backward(*(x for x in given if isinstance(x, torch.Tensor)))
    ctx.others = tuple(None if isinstance(x, torch.Tensor) else (x,) for x in given)


def saved(ctx: Any) -> list[Any]:
    """What `save` saved."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]


def no_second_derivative(ctx: Any, *_: torch.Tensor) -> None:
    """Refuses a second backward pass."""
    raise RuntimeError(
        "longattn.torch: got a second backward pass (create_graph=True), expected one: gradients of gradients are not "
        "computed; use torch.nn.functional.scaled_dot_product_attention for them"
    )


def _backward_of_neighborhood(ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor) -> tuple[Any, ...]:
    given = saved(ctx)
    dq, dk, dv, *others = _neighborhood_backward(d_out, d_lse, *given)
    # q, k, v, the rule, then what may be absent, then scale and softcap.
    present = (d if x is not None else None for d, x in zip(others, given[9:12], strict=True))
    return dq, dk, dv, None, None, None, None, *present, None, None


def _backward_of_block_sparse(ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor) -> tuple[Any, ...]:
    given = saved(ctx)
    return *_block_sparse_backward(d_out, d_lse, *given), *(None,) * (len(given) - 5)


def _backward_of_windowed(ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor) -> tuple[Any, ...]:
    given = saved(ctx)
    return *_windowed_backward(d_out, d_lse, *given), *(None,) * (len(given) - 5)


torch.library.register_autograd("longattn::neighborhood_attention", _backward_of_neighborhood, setup_context=save)
torch.library.register_autograd("longattn::block_sparse_attention", _backward_of_block_sparse, setup_context=save)
torch.library.register_autograd("longattn::windowed_attention", _backward_of_windowed, setup_context=save)
torch.library.register_autograd("longattn::neighborhood_attention_backward", no_second_derivative)
torch.library.register_autograd("longattn::block_sparse_attention_backward", no_second_derivative)
torch.library.register_autograd("longattn::windowed_attention_backward", no_second_derivative)
