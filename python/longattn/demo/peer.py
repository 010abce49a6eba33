"""The peer: the same weights in transformers, with its SDPA attention and DynamicCache."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import transformers
from longattn.demo.runner import MODEL
from transformers import DynamicCache, SmolLM3ForCausalLM


class TransformersDecoder:
    """`SmolLM3ForCausalLM` over one sequence, its full layers' attention and cache updates clocked."""

    chunk = 2048  # tokens per prefill step

    def __init__(self, dtype: str = "float32", folder: Path = MODEL) -> None:
        transformers.utils.logging.disable_progress_bar()
        self._model = SmolLM3ForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        transformers.utils.logging.enable_progress_bar()
        self._cache = DynamicCache(config=self._model.config)
        layers = list(zip(self._model.config.layer_types, self._cache.layers, strict=True))
        self._full = [layer for kind, layer in layers if kind == "full_attention"]
        self._sliding = [layer for kind, layer in layers if kind == "sliding_attention"]
        self._clock = 0.0
        self._mark: tuple[int, list[dict[str, Any]]] | None = None
        for layer in self._full:
            layer.update = self._timed(layer.update)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self._clock += time.perf_counter() - start
            return result

        return call

    def attention_clock(self) -> float:
        return self._clock

    @torch.inference_mode()
    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        timed = self._timed(sdpa)

        def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
            return (timed if module.sliding_window is None else sdpa)(module, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
        try:
            out = self._model(torch.from_numpy(tokens)[None], past_key_values=self._cache, logits_to_keep=1)
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa
        logits: NDArray[np.float32] = out.logits[0, -1].float().numpy()
        return logits

    def set_mark(self) -> None:
        """`rewind` comes back here."""
        # Sliding layers forget what leaves their window, so they cannot be cropped: their tensors are kept.
        self._mark = self._full[0].get_seq_length(), [vars(layer).copy() for layer in self._sliding]

    def rewind(self) -> None:
        if self._mark is None:
            raise RuntimeError("rewind before set_mark")
        length, sliding = self._mark
        for layer in self._full:
            layer.crop(length - layer.get_seq_length())
        for layer, state in zip(self._sliding, sliding, strict=True):
            vars(layer).update(state)
