"""Masks as parameters: what an attention layer may see, in a few numbers instead of an L x L matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """What the queries of one forward pass may see.

    Positions count arrivals, padding included: query row `i` sits at `q_offset + i`, key row `j` at
    `kv_offset + j`.

    Attributes:
        causal: a query sees no key behind its own position.
        window: keys a query sees at most, its own included (sliding window); `None` for all.
        q_length: query rows.
        q_offset: tokens that arrived before this forward pass.
        kv_length: key rows.
        kv_offset: position of the first key row.
        padding: bool `[B, kv_offset + kv_length]`, True for tokens and False for padding; `None` when nothing
            is padded.
    """

    causal: bool
    window: int | None
    q_length: int
    q_offset: int
    kv_length: int
    kv_offset: int
    padding: torch.Tensor | None

    def key_padding(self) -> torch.Tensor | None:
        """Bool `[B, 1, 1, kv_length]`, True for tokens; `None` when nothing is padded."""
        return None if self.padding is None else self.padding[:, None, None, self.kv_offset :]


def longattn_mask(  # transformers' signature
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> MaskSpec | torch.Tensor:
    """The mask function of `"longattn"`; called once per kind of layer and forward pass.

    Plain causal, sliding-window and bidirectional attention give a `MaskSpec`. Anything else that
    transformers composes (packed sequences, image blocks, masks of the model's own) has no such form: it
    gives the dense bool mask `[B, 1, q_length, kv_length]` that transformers itself would use, correct and of
    quadratic size.

    Raises:
        ValueError: chunked attention, a static cache, or an `attention_mask` that does not reach to the last
            key.
    """
    if local_size is not None and _is_chunked(config, local_size):
        raise ValueError(
            "chunked attention (attention_chunk_size) is not supported by attn_implementation='longattn': "
            "load the model with attn_implementation='sdpa'"
        )
    sliding = local_size is not None and allow_is_causal_skip
    causal = mask_function is causal_mask_function and allow_is_causal_skip
    bidirectional = mask_function is bidirectional_mask_function and allow_is_bidirectional_skip
    if use_vmap or not (sliding or causal or bidirectional):
        dense: torch.Tensor = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            local_size,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=kwargs.get("device", "cpu"),
        )
        return dense
    # The last query sits at the last key. A bidirectional mask may say otherwise, but there it makes no
    # difference.
    offset = kv_offset + kv_length - q_length
    if isinstance(q_offset, torch.Tensor) or (not bidirectional and q_offset != offset):
        raise ValueError(
            f"attention_mask: got {kv_length} keys from position {kv_offset} on, expected them to end at the "
            f"last of {q_length} queries from position {int(q_offset)} on. attn_implementation='longattn' "
            "does not work on a static cache; use a LongAttnCache or a DynamicCache"
        )
    spec = MaskSpec(
        causal=not bidirectional,
        window=local_size if sliding else None,
        q_length=q_length,
        q_offset=offset,
        kv_length=kv_length,
        kv_offset=kv_offset,
        padding=None,
    )
    return spec if attention_mask is None else _with_padding(spec, attention_mask)


def _with_padding(spec: MaskSpec, attention_mask: torch.Tensor) -> MaskSpec:
    """`spec` with the 2-D mask of the tokens it covers, or as it is when all of them are tokens."""
    end = spec.kv_offset + spec.kv_length
    if attention_mask.shape[-1] < end:
        raise ValueError(
            f"attention_mask: got length {attention_mask.shape[-1]}, expected at least {end}: the tokens in "
            "the cache and the new ones"
        )
    padding = attention_mask[:, :end].to(torch.bool)
    if bool(padding.all()):
        return spec
    return replace(spec, padding=padding)


def _is_chunked(config: Any, local_size: int) -> bool:
    # transformers passes both sliding windows and attention chunks as `local_size`, and the mask functions of
    # the two cannot be told apart without looking into their closures. The config can: no architecture has
    # both at one size.
    chunk = getattr(config, "attention_chunk_size", None)
    return chunk == local_size and getattr(config, "sliding_window", None) != local_size
