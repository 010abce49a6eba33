"""longattn inside torch: autograd and `torch.compile`. Needs torch 2.5; import it as `longattn.torch`.

    import longattn.torch
    out = longattn.torch.attention(q, k, v, causal=True)     # q, k, v may require grad

`attention` takes the place of `torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True,
enable_gqa=True)` for CPU tensors. What differs: masks of booleans go to `mask`, masks to add to `bias`; grouped
heads need no flag; with fewer queries than keys `causal` aligns at the end; there is no dropout.

With states of fixed size there are `linear_attention`, `lightning_attention`, `retention`, `gated_linear_attention`,
`delta_rule_attention`, `gated_delta_rule`, `kimi_delta_attention`, `rwkv6`, `state_space_duality` and `selective_scan`,
as in `longattn.linear`.

The operators behind the functions are `torch.ops.longattn.attention`, `.attention_varlen`, `.merge`,
`.neighborhood_attention`, `.halo_attention`, `.na_qk`, `.na_av`, `.block_sparse_attention`, `.windowed_attention`,
`.recurrence` and `.selective_scan`, each with its gradient and the shapes of its results, so that
`torch.compile(fullgraph=True)` keeps them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch

import longattn as la
from longattn._checks import flag
from longattn._torch_linear import (
    delta_rule_attention,
    diagonal_scan,
    gated_delta_rule,
    gated_linear_attention,
    gated_slot_attention,
    hgrn2,
    kimi_delta_attention,
    lightning_attention,
    linear_attention,
    retention,
    rwkv6,
    rwkv7,
    selective_scan,
    state_space_duality,
)
from longattn._torch_operators import (
    PACKED_ARGUMENTS,
    SCORE_ARGUMENTS,
    Given,
    Pair,
    check_constants,
    operator,
    pair_of,
    split_options,
    split_scale,
)
from longattn._torch_sparse import (
    block_sparse_attention,
    halo_attention,
    na_av,
    na_qk,
    neighborhood_attention,
    windowed_attention,
)

__all__ = [
    "attention",
    "attention_varlen",
    "block_sparse_attention",
    "delta_rule_attention",
    "diagonal_scan",
    "gated_delta_rule",
    "gated_linear_attention",
    "gated_slot_attention",
    "halo_attention",
    "hgrn2",
    "kimi_delta_attention",
    "lightning_attention",
    "linear_attention",
    "merge",
    "na_av",
    "na_qk",
    "neighborhood_attention",
    "retention",
    "rwkv6",
    "rwkv7",
    "selective_scan",
    "state_space_duality",
    "windowed_attention",
]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
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
    """`longattn.attention` for torch's autograd and `torch.compile`, with equal results.

    Also under `torch.func.grad`, `vjp`, `jacrev` and `vmap` (one call per entry).

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, or all of `q`, `k` and `v`
            float64 (slowly). May require grad.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes. May require grad.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`. May require grad.
        causal: a query sees only keys at its own position and before; the last query is at the last key.
        window: `(left, right)`: keys that a query sees before and after its position; -1 is unbounded.
        scale: factor on the dot products; `None` is `D ** -0.5`. A floating tensor `[Hq]`, `[Hq, Lq]` or
            `[B, Hq, Lq]` has one factor per head or per query row; a constant.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        bias: floating, broadcastable to `[B, Hq, Lq, Lk]`, added to the logits; a constant.
        mask: boolean, broadcastable as `bias`; True lets the query see the key.
        alibi_slopes: floating `[Hq]` or `[B, Hq]`; a constant.
        sinks: floating `[Hq]`: a logit per head without a value. May require grad.
        relative_bias: floating `[Hq, n]`: a bias by distance, as in `longattn.attention`; a constant.
        relative_zero: the entry of distance 0; `None` is the last.
        segments: pair of integers `[Lq]` or `[B, Lq]` and `[Lk]` or `[B, Lk]`: a query sees only keys of its own
            number.
        visible_until: integers `[Lk]` or `[B, Lk]`: only positions below `visible_until[j]` see key `j`.
        return_lse: also return the log-sum-exp of the logits, differentiable as well, so that parts over
            disjoint keys merge under autograd.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) in the dtype of `q`; with `return_lse`, the pair with
        the lse, float32 (float64 for float64) `[B, Hq, Lq]` (or `[Hq, Lq]`).

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, a tensor outside CPU memory, or a constant that
            requires grad.
        RuntimeError: from a second backward pass: gradients of gradients are not computed.

    Cost:
        Forward as `longattn.attention`; backward 2.5 times its arithmetic, with `q`, `k`, `v`, the output and the
        lse saved and a float32 copy of the gradient of `q` held meanwhile: memory linear in the lengths.

    Example:
        >>> import torch, longattn.torch
        >>> q = torch.randn(1, 8, 100, 64, requires_grad=True)
        >>> k, v = torch.randn(2, 1, 2, 100, 64)
        >>> longattn.torch.attention(q, k, v, causal=True).square().sum().backward()
        >>> q.grad.shape
        torch.Size([1, 8, 100, 64])
    """
    return_lse = flag(return_lse, "return_lse")
    number, factors = split_scale(scale)
    of_queries, of_keys = pair_of(segments, "segments")
    check_constants(
        {"q": q, "k": k, "v": v, "sinks": sinks},
        {
            "scale": factors,
            "bias": bias,
            "mask": mask,
            "alibi_slopes": alibi_slopes,
            "relative_bias": relative_bias,
            "segments[0]": of_queries,
            "segments[1]": of_keys,
            "visible_until": visible_until,
        },
    )
    left, right = pair_of(window, "window")
    out, lse = _attention(
        q=q,
        k=k,
        v=v,
        causal=causal,
        window_left=left,
        window_right=right,
        scale=number,
        row_scales=factors,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        relative_bias=relative_bias,
        relative_zero=relative_zero,
        q_segments=of_queries,
        k_segments=of_keys,
        visible_until=visible_until,
        sinks=sinks,
    )
    return (out, lse) if return_lse else out


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    relative_bias: torch.Tensor | None = None,
    relative_zero: int | None = None,
    return_lse: bool = False,
) -> Any:
    """`longattn.attention_varlen` for torch's autograd and `torch.compile`, with equal results.

    Args:
        q: queries `[Tq, Hq, D]`; float32, float16 or bfloat16. May require grad.
        k: keys `[Tk, Hkv, D]`; any of the three dtypes. May require grad.
        v: values `[Tk, Hkv, Dv]`; dtype of `k`. May require grad.
        cu_seqlens_q: integers `[sequences + 1]` that start at 0, never fall, and end at `Tq`.
        cu_seqlens_k: the same for keys, ending at `Tk`.
        causal: as in `attention`, inside each sequence.
        window: as in `attention`, inside each sequence.
        scale: as in `attention`, a tensor being `[Hq]`.
        softcap: as in `attention`.
        alibi_slopes: floating `[Hq]`; a constant.
        sinks: floating `[Hq]`. May require grad.
        relative_bias: floating `[Hq, n]`; a constant.
        relative_zero: as in `attention`.
        return_lse: also return the log-sum-exp of the logits, differentiable as well.

    Returns:
        The output `[Tq, Hq, Dv]` in the dtype of `q`; with `return_lse`, the pair with the lse, float32
        `[Hq, Tq]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: as in `attention`, or sequence bounds that do not fit the arrays.
        RuntimeError: from a second backward pass.

    Cost:
        That of `attention` summed over the sequences.
    """
    return_lse = flag(return_lse, "return_lse")
    number, factors = split_scale(scale)
    check_constants(
        {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "sinks": sinks},
        {"scale": factors, "alibi_slopes": alibi_slopes, "relative_bias": relative_bias},
    )
    left, right = pair_of(window, "window")
    out, lse = _varlen(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        causal=causal,
        window_left=left,
        window_right=right,
        scale=number,
        row_scales=factors,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        relative_bias=relative_bias,
        relative_zero=relative_zero,
        sinks=sinks,
    )
    return (out, lse) if return_lse else out


def merge(parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """`longattn.merge` for torch's autograd and `torch.compile`, with equal results.

    Args:
        parts: pairs `(o, lse)`, at least one, of attention over disjoint keys: `o` `[B, H, L, Dv]` or
            `[H, L, Dv]`, float32, float16 or bfloat16; `lse` floating `[B, H, L]` or `[H, L]`. All may require
            grad.

    Returns:
        The pair `(o, lse)` over the union of the keys: the dtype of the parts, and float32.

    Raises:
        TypeError: a part that is no pair, or tensors of another kind or dtype.
        ValueError: no parts, shapes that differ, or a tensor outside CPU memory.

    Cost:
        One pass over all parts; backward some passes in float32.
    """
    pairs = list(parts)
    for n, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"parts[{n}]: got {type(pair).__name__}, expected a pair (o, lse)")
        check_constants({f"parts[{n}] o": pair[0], f"parts[{n}] lse": pair[1]}, {})
    if not pairs:
        raise ValueError("parts: got none, expected at least one pair (o, lse)")
    return cast("tuple[torch.Tensor, torch.Tensor]", _merge([o for o, _ in pairs], [lse for _, lse in pairs]))


# The operators: plain arguments in, tensors out. What they are given is checked by the functions they call.


def _forward(function: Callable[..., Any]) -> Callable[[Given], Any]:
    def forward(x: Given) -> Any:
        places, options = split_options(x)
        return function(*places, **options, return_lse=True)

    return forward


def _backward(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    def backward(d_out: torch.Tensor, d_lse: torch.Tensor, x: Given, results: Pair) -> list[Any]:
        (q, k, v, *bounds), options = split_options(x)
        has = options["sinks"] is not None
        found = function(d_out, q, k, v, *results, *bounds, d_lse=d_lse, **options, return_d_sinks=has)
        return [*found[:3], found[3] if has else None]

    return backward


def _shapes(x: Given) -> Pair:
    q, v = x["q"], x["v"]
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=sums)


def _packed_shapes(x: Given) -> Pair:
    q, v = x["q"], x["v"]
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


_attention = operator(
    "attention",
    f"Tensor q, Tensor k, Tensor v, {SCORE_ARGUMENTS}",
    _forward(la.attention),
    _backward(la.dense.attention_backward),
    _shapes,
    gradients=("q", "k", "v", "sinks"),
)

_varlen = operator(
    "attention_varlen",
    f"Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, {PACKED_ARGUMENTS}",
    _forward(la.attention_varlen),
    _backward(la.dense.attention_varlen_backward),
    _packed_shapes,
    gradients=("q", "k", "v", "sinks"),
)


@torch.library.custom_op("longattn::merge", mutates_args=(), device_types="cpu")
def _merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return la.merge(zip(outs, lses, strict=True))


@_merge.register_fake
def _(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape, dtype=torch.float32)


def _save_parts(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    outs, lses = inputs
    ctx.save_for_backward(*outs, *lses, *output)


def _backward_of_merge(
    ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """With `w = exp(lse_p - lse)`: `d_o_p = w d_out` and `d_lse_p = w (d_out (o_p - out) + d_lse)`."""
    *parts, out, lse = ctx.saved_tensors
    count = len(parts) // 2
    d_outs, d_lses = [], []
    for o, part in zip(parts[:count], parts[count:], strict=True):
        # Parts that saw nothing have no weight, whatever they hold.
        seen = part != -torch.inf
        weight = torch.where(seen, (part.float() - lse).exp(), 0.0)
        d_outs.append((weight.unsqueeze(-1) * d_out.float()).to(o.dtype))
        change = (d_out.float() * (o.float() - out.float())).sum(-1) + d_lse
        d_lses.append(torch.where(seen, weight * change, 0.0).to(part.dtype))
    return d_outs, d_lses


torch.library.register_autograd("longattn::merge", _backward_of_merge, setup_context=_save_parts)
