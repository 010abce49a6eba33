"""Oracles of `longattn.distributed`."""

from longattn.reference.distributed.burst_attention import burst_attention, positions

__all__ = ["burst_attention", "positions"]
