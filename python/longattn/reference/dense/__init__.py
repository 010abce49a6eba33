"""Oracles of `longattn.dense`."""

from longattn.reference.dense.attention import attention, attention_varlen, merge, visible_keys, weighted_values

__all__ = ["attention", "attention_varlen", "merge", "visible_keys", "weighted_values"]
