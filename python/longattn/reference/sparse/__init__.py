"""Oracles of `longattn.sparse`."""

from longattn.reference.sparse.transient_global_attention import (
    local_global_attention,
    t5_bucket,
    transient_global_attention,
)

__all__ = ["local_global_attention", "t5_bucket", "transient_global_attention"]
