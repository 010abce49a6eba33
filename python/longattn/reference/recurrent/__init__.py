"""Oracles of `longattn.recurrent`."""

from longattn.reference.recurrent.gated_fifo_memory_attention import gated_fifo_memory_attention

__all__ = ["gated_fifo_memory_attention"]
