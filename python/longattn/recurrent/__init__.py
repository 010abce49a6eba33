"""Attention with a memory that is rewritten as a sequence goes on."""

from longattn.recurrent.gated_fifo_memory_attention import GatedFifoMemory, gated_fifo_memory_attention

__all__ = ["GatedFifoMemory", "gated_fifo_memory_attention"]
