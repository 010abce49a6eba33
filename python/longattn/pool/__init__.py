"""Attention to summaries of groups of tokens."""

from longattn.pool.core_context_attention import CoreContextCache, core_context_attention, core_context_pool
from longattn.pool.learned_aggregation_pool import learned_aggregation_pool
from longattn.pool.pool_token_mixer import pool_token_mixer

__all__ = [
    "CoreContextCache",
    "core_context_attention",
    "core_context_pool",
    "learned_aggregation_pool",
    "pool_token_mixer",
]
