"""Oracles of `longattn.linear`."""

from longattn.reference.linear.lasp2_linear_attention import lasp2_linear_attention, lasp2_linear_attention_backward

__all__ = ["lasp2_linear_attention", "lasp2_linear_attention_backward"]
