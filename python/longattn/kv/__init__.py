"""Where keys and values live: the host store."""

from longattn.kv.store import KVStore

__all__ = ["KVStore"]
