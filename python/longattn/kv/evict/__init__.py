"""Policies that keep a part of a sequence's keys and values: one module per policy, all for `EvictingCache`."""

from longattn.kv.evict.a_vl_cache import AVLCache, fastv_keep
from longattn.kv.evict.attention_gate import AttentionGate, attention_gate, gated_attention
from longattn.kv.evict.by_name import KINDS, make
from longattn.kv.evict.cache import EvictingCache, EvictionStats
from longattn.kv.evict.compressed import CompressedPrompt
from longattn.kv.evict.heavy_hitter import HeavyHitter
from longattn.kv.evict.lazy_eviction import LazyEviction
from longattn.kv.evict.nats_attention import Nats, nats_attention, nats_types, nats_visibility
from longattn.kv.evict.policy import Policy
from longattn.kv.evict.razor_attention import RazorAttention, razor_compress
from longattn.kv.evict.selective_attention import SelectiveBudget
from longattn.kv.evict.snap_kv import SnapKV
from longattn.kv.evict.streaming_llm import StreamingLLM, sink_window_attention

__all__ = [
    "KINDS",
    "AVLCache",
    "AttentionGate",
    "CompressedPrompt",
    "EvictingCache",
    "EvictionStats",
    "HeavyHitter",
    "LazyEviction",
    "Nats",
    "Policy",
    "RazorAttention",
    "SelectiveBudget",
    "SnapKV",
    "StreamingLLM",
    "attention_gate",
    "fastv_keep",
    "gated_attention",
    "make",
    "nats_attention",
    "nats_types",
    "nats_visibility",
    "razor_compress",
    "sink_window_attention",
]
