"""Where keys and values live: the host store."""

from longattn._arrays import CodedRows
from longattn.kv.store import KVStore

__all__ = ["CodedRows", "KVStore"]
