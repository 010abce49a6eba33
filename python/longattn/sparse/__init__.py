"""Attention to a fixed or chosen part of the keys."""

from longattn.sparse.transient_global_attention import (
    local_global_attention,
    t5_relative_table,
    transient_global_attention,
)

__all__ = ["local_global_attention", "t5_relative_table", "transient_global_attention"]
