"""The cache that `generate(..., past_key_values=...)` takes, and what it tells about itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from longattn.transformers.device import DeviceConfig
from longattn.transformers.eviction import EvictionConfig
from longattn.transformers.layer import HostLayer
from longattn.transformers.retrieval import RetrievalConfig
from longattn.transformers.routing import Lists, RoutingConfig, check_lists
from longattn.transformers.sparse import SparsePrefill

Config = TypeVar("Config", RetrievalConfig, EvictionConfig, SparsePrefill, RoutingConfig)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LayerStats:
    """One layer of a `LongAttnCache`.

    Counts are of decoding steps, summed over sequences, query rows and KV heads.

    Attributes:
        layer_idx: number of the layer in the model.
        sliding_window: its window, `None` for full attention.
        length: tokens that arrived, padding included.
        sequences: sequences of the batch.
        keys_visible: keys that exact attention would have read.
        keys_read: keys that were read exactly.
        missed_mass: mean estimated share of the softmax mass outside the keys read.
        store_nbytes: host memory of the keys and values.
        index_nbytes: host memory of the index, or of what an eviction policy keeps beside the rows.
        prompt_density: share of the pairs of queries and keys that sparse prefills attended; 1.0 without any.
    """

    layer_idx: int
    sliding_window: int | None
    length: int
    sequences: int
    keys_visible: int
    keys_read: int
    missed_mass: float
    store_nbytes: int
    index_nbytes: int
    prompt_density: float = 1.0

    @property
    def fraction_read(self) -> float:
        """Share of the visible keys that were read; 1.0 before the first decoding step."""
        return self.keys_read / self.keys_visible if self.keys_visible else 1.0


@dataclass(frozen=True)
class CacheStats:
    """All layers of a `LongAttnCache` at one moment. `str()` gives a table."""

    layers: tuple[LayerStats, ...]

    @property
    def nbytes(self) -> int:
        """Host memory of all keys, values and signatures."""
        return sum(layer.store_nbytes + layer.index_nbytes for layer in self.layers)

    @property
    def keys_visible(self) -> int:
        """Keys that exact attention would have read in all decoding steps."""
        return sum(layer.keys_visible for layer in self.layers)

    @property
    def keys_read(self) -> int:
        """Keys that were read exactly in all decoding steps."""
        return sum(layer.keys_read for layer in self.layers)

    @property
    def fraction_read(self) -> float:
        """Share of the visible keys that were read; 1.0 before the first decoding step."""
        return self.keys_read / self.keys_visible if self.keys_visible else 1.0

    def __str__(self) -> str:
        lines = ["layer  attention      length  keys read  missed mass  store MiB  index MiB"]
        for layer in self.layers:
            kind = "full" if layer.sliding_window is None else f"window {layer.sliding_window}"
            lines.append(
                f"{layer.layer_idx:5d}  {kind:12s} {layer.length:8d}  {layer.fraction_read:9.2%}"
                f"  {layer.missed_mass:11.2e}  {layer.store_nbytes / 2**20:9.2f}"
                f"  {layer.index_nbytes / 2**20:9.2f}"
            )
        return "\n".join(
            [*lines, f"all layers: {self.fraction_read:.2%} of the keys read, {self.nbytes / 2**20:.1f} MiB"]
        )


class LongAttnCache(Cache):  # type: ignore[misc]  # transformers has no types to check against
    """A KV cache in host memory for a decoder model loaded with `attn_implementation="longattn"`.

    Full and sliding-window attention layers keep every sequence of the batch in a `longattn.KVStore`; sliding
    layers let go of rows that have left the window. Other kinds of layers (linear attention, convolutions)
    get transformers' own cache layers. The cache serves several `generate` calls in a row, beam search,
    assisted decoding and padded batches.

    Forward passes of more than `decode_length` new tokens are prefill: exact, but in full-attention layers with a
    `SparsePrefill`, where a selector chooses keys. Shorter ones onto a cache
    that is not empty are decoding steps: full-attention layers with a `RetrievalConfig` then read a part of
    their keys. With an `EvictionConfig` they keep a part instead, from the prompt on.

    Args:
        config: the model's config (`model.config`).
        dtype: storage dtype `"float32"`, `"float16"`, `"bfloat16"` or the torch dtype; default the dtype of
            the keys.
        capacity: tokens per sequence. Address space is reserved for them, memory is used as they come.
        retrieval: one `RetrievalConfig` for all full-attention layers, or a mapping from layer number to
            `RetrievalConfig` or `None`; layers left out, and all by default, decode exactly.
        eviction: one `EvictionConfig` for all full-attention layers, or a mapping as for `retrieval`; a layer has
            one of the two at most.
        decode_length: new tokens per forward pass up to which it counts as a decoding step (candidate tokens
            of assisted decoding are several).
        prefill: one `SparsePrefill` for all full-attention layers, or a mapping from layer number to `SparsePrefill`
            or `None`; layers left out, and all by default, attend from prompts to all keys.
        device: a `DeviceConfig` for a model on a GPU, whose full-attention layers keep sinks and window there and all
            other rows in host memory, and whose sliding layers stay there; excludes the three above and `routing`. Such
            a cache cannot go back or be copied. `None` for a model on the CPU.
        routing: one `RoutingConfig` for all full-attention layers, or a mapping as for `retrieval`: which heads, or
            whether all, read few keys. A layer has retrieval, eviction or routing, one at most.

    Raises:
        ValueError: an argument out of range, or a model this cache cannot hold: encoder-decoder, chunked
            attention (Llama 4), multi-head latent attention (DeepSeek), layers that share keys (Gemma 4).
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        config: Any,
        *,
        dtype: str | torch.dtype | None = None,
        capacity: int = 131072,
        retrieval: RetrievalConfig | Mapping[int, RetrievalConfig | None] | None = None,
        eviction: EvictionConfig | Mapping[int, EvictionConfig | None] | None = None,
        decode_length: int = 16,
        prefill: SparsePrefill | Mapping[int, SparsePrefill | None] | None = None,
        device: DeviceConfig | None = None,
        routing: RoutingConfig | Mapping[int, RoutingConfig | None] | None = None,
    ) -> None:
        for name, count in (("capacity", capacity), ("decode_length", decode_length)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}: got {count!r}, expected an integer >= 1")
        store_dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if dtype is not None and store_dtype not in _DTYPES.values():
            raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(_DTYPES)}")
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config: got {type(config).__name__}, expected the model's config (model.config)")
        text_config = config.get_text_config(decoder=True)
        kinds, arguments = get_layer_types_and_kwargs(text_config)
        _refuse_unsupported(text_config, kinds)
        chosen = _by_layer(retrieval, kinds, RetrievalConfig, "retrieval")
        evicting = _by_layer(eviction, kinds, EvictionConfig, "eviction")
        both = [i for i, how in chosen.items() if how is not None and evicting.get(i) is not None]
        if both:
            raise ValueError(f"eviction: got layers {both} with retrieval as well, expected one of the two")
        sparse = _by_layer(prefill, kinds, SparsePrefill, "prefill")
        both = [i for i, how in sparse.items() if how is not None and evicting.get(i) is not None]
        if both:
            raise ValueError(f"prefill: got layers {both} with eviction as well, expected one of the two")
        routed = _by_layer(routing, kinds, RoutingConfig, "routing")
        for name, given in (("retrieval", chosen), ("eviction", evicting)):
            both = [i for i, how in routed.items() if how is not None and given.get(i) is not None]
            if both:
                raise ValueError(f"routing: got layers {both} with {name} as well, expected one of the two")
        check_lists(routed)
        lists: defaultdict[int, Lists] = defaultdict(Lists)
        if device is not None and not isinstance(device, DeviceConfig):
            raise TypeError(f"device: got {type(device).__name__}, expected a DeviceConfig or None")
        others = {"retrieval": retrieval, "eviction": eviction, "prefill": prefill, "routing": routing}
        beside = [name for name, value in others.items() if value is not None]
        if device is not None and beside:
            raise ValueError(f"device: got {' and '.join(beside)} as well, expected neither with rows on a device")
        layers = []
        for layer_idx, (kind, kwargs) in enumerate(zip(kinds, arguments, strict=True)):
            if kind in ("full_attention", "sliding_attention"):
                layer = HostLayer(
                    sliding_window=kwargs.get("sliding_window"),
                    dtype=store_dtype,
                    capacity=capacity,
                    retrieval=chosen.get(layer_idx),
                    eviction=evicting.get(layer_idx),
                    decode_length=decode_length,
                    prefill=sparse.get(layer_idx),
                    on_device=device,
                    routing=routed.get(layer_idx),
                    lists=lists,
                )
                layers.append(layer)
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
        super().__init__(layers=layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens of every sequence; on an error, in no layer.

        Raises:
            ValueError: a positive count, more tokens than arrived, or further back than a sliding layer
                remembers.
        """
        for layer in self.layers:
            if isinstance(layer, HostLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def stats(self) -> CacheStats:
        """What decoding has read since the cache was made or reset, and the host memory in use."""
        return CacheStats(
            tuple(
                LayerStats(
                    layer_idx=layer_idx,
                    sliding_window=layer.sliding_window,
                    length=layer.get_seq_length(),
                    sequences=len(layer.sequences),
                    keys_visible=layer.counts.keys_visible,
                    keys_read=layer.counts.keys_read,
                    missed_mass=layer.counts.missed_mass / max(layer.counts.query_rows, 1),
                    store_nbytes=sum(s.nbytes for s in layer.sequences),
                    index_nbytes=sum(s.index_nbytes for s in layer.sequences),
                    prompt_density=(
                        layer.counts.prompt_attended / layer.counts.prompt_pairs if layer.counts.prompt_pairs else 1.0
                    ),
                )
                for layer_idx, layer in enumerate(self.layers)
                if isinstance(layer, HostLayer)
            )
        )


def _refuse_unsupported(config: Any, kinds: list[str]) -> None:
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"config: {name} is an encoder-decoder model, expected a decoder")
    if "chunked_attention" in kinds:
        raise ValueError(
            f"config: {name} has chunked_attention layers (as Llama 4 has), which LongAttnCache cannot hold"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"config: {name} uses multi-head latent attention (kv_lora_rank), which LongAttnCache cannot hold"
        )
    if "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise ValueError(f"config: {name} has layers that share the keys of others, which LongAttnCache cannot hold")
    unknown = sorted(set(kinds) - DYNAMIC_LAYER_TYPE_MAPPING.keys())
    if unknown:
        raise ValueError(
            f"config: {name} has layers of kind {', '.join(unknown)}, expected kinds transformers can cache"
        )


def _by_layer(
    given: Config | Mapping[int, Config | None] | None, kinds: list[str], config: type[Config], name: str
) -> Mapping[int, Config | None]:
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    if given is None:
        return {}
    if isinstance(given, config):
        return dict.fromkeys(full, given)
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: got {type(given).__name__}, expected a {config.__name__} or a mapping from layers")
    for layer_idx, how in given.items():
        if how is not None and not isinstance(how, config):
            raise TypeError(f"{name}[{layer_idx}]: got {type(how).__name__}, expected a {config.__name__} or None")
        if how is not None and layer_idx not in full:
            raise ValueError(f"{name}: got layer {layer_idx!r}, expected full-attention layers, which are {full}")
    return given
