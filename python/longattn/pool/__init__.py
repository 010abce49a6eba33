"""Attention to summaries of groups of tokens."""

from longattn.pool.core_context_attention import CoreContextCache, core_context_attention, core_context_pool

__all__ = ["CoreContextCache", "core_context_attention", "core_context_pool"]
