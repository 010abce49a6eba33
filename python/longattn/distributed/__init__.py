"""Attention of a sequence that is cut over several workers, with the workers as threads of this process."""

from longattn.distributed.burst_attention import (
    BurstStats,
    burst_attention,
    burst_attention_backward,
    shard_attention,
    shard_attention_backward,
    shard_rows,
)

__all__ = [
    "BurstStats",
    "burst_attention",
    "burst_attention_backward",
    "shard_attention",
    "shard_attention_backward",
    "shard_rows",
]
