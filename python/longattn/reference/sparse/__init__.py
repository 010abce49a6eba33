"""Oracles of `longattn.sparse`."""

from longattn.reference.sparse.overlapped_chunk_attention import kernel_pool, overlapped_chunk_attention
from longattn.reference.sparse.transient_global_attention import (
    local_global_attention,
    t5_bucket,
    transient_global_attention,
)

__all__ = [
    "kernel_pool",
    "local_global_attention",
    "overlapped_chunk_attention",
    "t5_bucket",
    "transient_global_attention",
]
