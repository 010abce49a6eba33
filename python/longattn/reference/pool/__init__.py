"""Oracles of `longattn.pool`."""

from longattn.reference.pool.core_context_attention import core_context_attention, core_context_pool
from longattn.reference.pool.learned_aggregation_pool import learned_aggregation_pool
from longattn.reference.pool.pool_token_mixer import pool_token_mixer

__all__ = [
    "core_context_attention",
    "core_context_pool",
    "learned_aggregation_pool",
    "pool_token_mixer",
]
