"""Attention to a fixed or chosen part of the keys."""

from longattn.sparse.overlapped_chunk_attention import kernel_pool, overlapped_chunk_attention
from longattn.sparse.transient_global_attention import (
    local_global_attention,
    t5_relative_table,
    transient_global_attention,
)

__all__ = [
    "kernel_pool",
    "local_global_attention",
    "overlapped_chunk_attention",
    "t5_relative_table",
    "transient_global_attention",
]
