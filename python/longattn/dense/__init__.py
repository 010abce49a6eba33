"""Exact attention and the methods that are it: one module per method."""

from longattn.dense.attention import attention, attention_varlen, merge

__all__ = ["attention", "attention_varlen", "merge"]
