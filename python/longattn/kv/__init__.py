"""Where keys and values live: stores of one sequence, of a batch, of shared beginnings, of rows worth keeping."""

from longattn._arrays import CodedRows
from longattn.kv import evict
from longattn.kv.chunk_attention import PrefixTree, chunk_attention
from longattn.kv.evict import EvictingCache
from longattn.kv.slot_store import Attended, SlotStore
from longattn.kv.store import KVStore
from longattn.kv.virtual_kv_store import VirtualKVStore

__all__ = [
    "Attended",
    "CodedRows",
    "EvictingCache",
    "KVStore",
    "PrefixTree",
    "SlotStore",
    "VirtualKVStore",
    "chunk_attention",
    "evict",
]
