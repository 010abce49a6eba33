"""Oracles of `longattn.pool`."""

from longattn.reference.pool.core_context_attention import core_context_attention, core_context_pool

__all__ = ["core_context_attention", "core_context_pool"]
