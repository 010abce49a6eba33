"""Oracles of `longattn.kv`."""

from longattn.reference.kv import coded_rows, evicting
from longattn.reference.kv.a_vl_cache import AVLCache
from longattn.reference.kv.attention_gate_evict import attention_gate, gated_attention
from longattn.reference.kv.chunk_attention import PrefixTree, chunk_attention
from longattn.reference.kv.heavy_hitter import HeavyHitter
from longattn.reference.kv.lazy_eviction import LazyEviction
from longattn.reference.kv.nats_attention import nats_attention, nats_mask
from longattn.reference.kv.razor_attention import RazorAttention, compensated
from longattn.reference.kv.selective_budget import SelectiveBudget
from longattn.reference.kv.snap_kv import SnapKV
from longattn.reference.kv.streaming_llm import StreamingLLM
from longattn.reference.kv.virtual_kv_store import VirtualKVStore

__all__ = [
    "AVLCache",
    "HeavyHitter",
    "LazyEviction",
    "PrefixTree",
    "RazorAttention",
    "SelectiveBudget",
    "SnapKV",
    "StreamingLLM",
    "VirtualKVStore",
    "attention_gate",
    "chunk_attention",
    "coded_rows",
    "compensated",
    "evicting",
    "gated_attention",
    "nats_attention",
    "nats_mask",
]
