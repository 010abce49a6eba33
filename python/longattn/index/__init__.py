"""Indexes over a `KVStore`'s keys: small codes that are scanned instead of the keys, and grow with the store."""

from longattn.index.signatures import Signatures

__all__ = ["Signatures"]
