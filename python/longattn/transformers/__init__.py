"""transformers 5 models over a KV cache in host memory.

Importing this module registers the attention implementation `"longattn"`. A model loaded with it runs
unchanged:

    from transformers import AutoModelForCausalLM
    from longattn.transformers import LongAttnCache, RetrievalConfig

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="longattn")
    cache = LongAttnCache(model.config, retrieval=RetrievalConfig(top_k=256))
    model.generate(**inputs, past_key_values=cache, prefill_chunk_size=4096)
    print(cache.stats())

How a forward pass flows: transformers asks `masks.longattn_mask` once per kind of layer and gets a small
`MaskSpec`, never an L x L matrix; every attention layer hands its new keys and values to
`layer.HostLayer.update`, which gives them back as `HostKV` tensors that name their layer;
`attention.longattn_attention` receives queries, `HostKV` and `MaskSpec`, stores the rows and attends to the
store. Layers with states of fixed size have no such hook: `linear.use_linear_kernels(model)` puts our kernels in the
place of the functions that transformers computes them with. Without a `LongAttnCache` (no cache, or one of
transformers' own) the same function runs `longattn.attention` on the tensors it is given.
"""

from __future__ import annotations

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        "longattn.transformers needs torch and transformers: pip install 'longattn[transformers]'"
    ) from error

# The cache and mask interfaces below took their present form in 5.19.
if tuple(int(part) for part in _transformers.__version__.split(".")[:2]) < (5, 19):
    raise ImportError(f"longattn.transformers needs transformers 5.19 or newer, found {_transformers.__version__}")

from longattn.transformers.attention import longattn_attention
from longattn.transformers.cache import CacheStats, LayerStats, LongAttnCache
from longattn.transformers.device import DeviceConfig
from longattn.transformers.eviction import EvictionConfig
from longattn.transformers.layer import HostLayer
from longattn.transformers.linear import LinearKernels, use_linear_kernels
from longattn.transformers.masks import MaskSpec, longattn_mask
from longattn.transformers.retrieval import RetrievalConfig
from longattn.transformers.routing import RoutingConfig
from longattn.transformers.sparse import SparsePrefill

# Both, always: with an attention function but no mask function transformers drops the padding mask without a
# word.
_transformers.AttentionInterface.register("longattn", longattn_attention)
_transformers.AttentionMaskInterface.register("longattn", longattn_mask)

__all__ = [
    "CacheStats",
    "DeviceConfig",
    "EvictionConfig",
    "HostLayer",
    "LayerStats",
    "LinearKernels",
    "LongAttnCache",
    "MaskSpec",
    "RetrievalConfig",
    "RoutingConfig",
    "SparsePrefill",
    "longattn_attention",
    "longattn_mask",
    "use_linear_kernels",
]
