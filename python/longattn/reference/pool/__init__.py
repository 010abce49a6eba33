"""Oracles of `longattn.pool`."""

from longattn.reference.pool.core_context_attention import core_context_attention
from longattn.reference.pool.pool_token_mixer import pool_token_mixer

__all__ = ["core_context_attention", "pool_token_mixer"]
