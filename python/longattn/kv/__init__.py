"""Where keys and values live: host stores, of one sequence, of a batch, of sequences that share their beginnings."""

from longattn._arrays import CodedRows
from longattn.kv.chunk_attention import PrefixTree, chunk_attention
from longattn.kv.store import KVStore
from longattn.kv.virtual_kv_store import VirtualKVStore

__all__ = ["CodedRows", "KVStore", "PrefixTree", "VirtualKVStore", "chunk_attention"]
