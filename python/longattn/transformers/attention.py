"""The attention function that transformers calls in every layer."""

from __future__ import annotations

from typing import Any

import torch

import longattn as la
from longattn.gpu import is_on_gpu
from longattn.transformers.layer import HostKV
from longattn.transformers.masks import MaskSpec
from longattn.transformers.sequence import ScoreOptions

# Passed along to every attention function, and of no consequence to this one: positions are in the keys,
# masks are made already, the rest is for other implementations or other layers.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "seq_idx",
        "use_cache",
    }
)


def longattn_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskSpec | torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for `"longattn"`: over a `LongAttnCache`, or over `key` and `value` themselves.

    Args:
        module: the attention layer; its `is_causal` counts where neither a mask nor `is_causal` is given.
        query: `[B, Hq, L, D]`, float32, float16 or bfloat16; on the CPU, or on a GPU with a
            `LongAttnCache` that has a `DeviceConfig`.
        key: `[B, Hkv, Lk, D]`; from a `LongAttnCache` the new rows, which name the layer that holds all.
        value: `[B, Hkv, Lk, Dv]`.
        attention_mask: a `MaskSpec`; a 4-D bool mask (True = attend) or float bias `[B or 1, Hq or 1, L,
            Lk]`; or `None`.
        dropout: must be 0.
        scaling: factor of the inner products, default `D ** -0.5`.
        is_causal: overrides `module.is_causal`.
        sliding_window: window where no mask is given; else the mask's window counts, as in transformers'
            eager attention.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        s_aux: `[Hq]` logits that take part in the denominator only (attention sinks).
        position_bias: float `[B or 1, Hq or 1, L, Lk]` added to the logits; not with a `LongAttnCache`.
        output_attentions: must be false: the weights are never stored.
        **kwargs: further arguments of transformers; those this function does not know must be `None`.

    Returns:
        `[B, L, Hq, Dv]` in the dtype of `query`, and `None` for the weights.

    Raises:
        ValueError: an argument this implementation cannot honour, gradients among them.
        TypeError: an unknown argument that is not `None`.
    """
    if output_attentions:
        raise ValueError("output_attentions: attn_implementation='longattn' never stores the weights; use 'eager'")
    if dropout:
        raise ValueError(
            f"dropout: got {dropout}, expected 0: longattn is for inference; call model.eval(), or train "
            "with attn_implementation='sdpa'"
        )
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _WITHOUT_EFFECT)
    if unknown:
        raise TypeError(
            f"attn_implementation='longattn' does not know the arguments {', '.join(unknown)} of "
            f"{type(module).__name__}"
        )
    inputs = (query, s_aux, position_bias, *(() if isinstance(key, HostKV) else (key, value)))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise ValueError(
            "attn_implementation='longattn' computes no gradients: run the model under torch.no_grad(), or "
            "train with attn_implementation='sdpa'"
        )
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    options = ScoreOptions(scale=scale, softcap=float(softcap or 0.0), sinks=s_aux)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not isinstance(key, HostKV):
        return _attend(query, key, value, attention_mask, options, causal, sliding_window, position_bias), None
    if position_bias is not None or not causal:
        raise ValueError(
            f"{type(module).__name__} asks for {'a position_bias' if causal else 'non-causal attention'}, "
            "which a LongAttnCache does not support; use another cache"
        )
    return key.longattn_layer.attend(query, attention_mask, options), None


def _attend(  # one caller, which has them all by name
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec | torch.Tensor | None,
    options: ScoreOptions,
    causal: bool,
    sliding_window: int | None,
    position_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over the keys given: without a cache, or with one of transformers' own."""
    bias = position_bias
    window = sliding_window
    allowed: torch.Tensor | None = None
    if isinstance(mask, MaskSpec):
        causal, window, allowed = mask.causal, mask.window, mask.key_padding()
    elif mask is not None:  # complete: it holds causality and window, too
        causal, window = False, None
        if mask.dtype == torch.bool:
            allowed = mask
        else:
            bias = mask if bias is None else bias + mask
    if window is not None and not causal:
        raise ValueError(f"sliding_window: got {window} for non-causal attention without a mask, expected none")
    if is_on_gpu(query):
        return _attend_on_gpu(query, key, value, allowed, bias, options, causal=causal, window=window)
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    la.attention(
        query,
        key,
        value,
        causal=causal,
        window=(-1, -1) if window is None else (window - 1, 0),
        mask=allowed,
        bias=bias,
        out=out.transpose(1, 2),
        **options,
    )
    return out


def _attend_on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    bias: torch.Tensor | None,
    options: ScoreOptions,
    *,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """The same where kernels take float32 biases and sinks, and no `out`."""
    sinks = options["sinks"]
    out: torch.Tensor = la.attention(
        query,
        key,
        value,
        causal=causal,
        window=(-1, -1) if window is None else (window - 1, 0),
        mask=allowed,
        bias=None if bias is None else bias.float(),
        scale=options["scale"],
        softcap=options["softcap"],
        sinks=None if sinks is None else sinks.float(),
    )
    return out.transpose(1, 2)
