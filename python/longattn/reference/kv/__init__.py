"""Oracles of `longattn.kv`."""

from longattn.reference.kv import coded_rows
from longattn.reference.kv.chunk_attention import PrefixTree, chunk_attention
from longattn.reference.kv.virtual_kv_store import VirtualKVStore

__all__ = ["PrefixTree", "VirtualKVStore", "chunk_attention", "coded_rows"]
