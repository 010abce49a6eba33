"""Oracles of `longattn.dense`."""

from longattn.reference.dense.attention import attention, attention_varlen, merge, visible_keys, weighted_values
from longattn.reference.dense.attention_backward import attention_backward
from longattn.reference.dense.attention_weights import attention_weights
from longattn.reference.dense.fixed_head_size_attention import fixed_head_size_attention
from longattn.reference.dense.generalized_gaussian_bias_attention import generalized_gaussian_bias_attention
from longattn.reference.dense.grouped_query_attention import grouped_query_attention, mha_to_gqa
from longattn.reference.dense.head_scaled_nope_attention import head_scaled_nope_attention, mean_entropy
from longattn.reference.dense.multi_head_latent_attention import multi_head_latent_attention
from longattn.reference.dense.multi_query_attention import multi_query_attention
from longattn.reference.dense.prob_reduce import prob_reduce
from longattn.reference.dense.selective_attention import selective_attention

__all__ = [
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_weights",
    "fixed_head_size_attention",
    "generalized_gaussian_bias_attention",
    "grouped_query_attention",
    "head_scaled_nope_attention",
    "mean_entropy",
    "merge",
    "mha_to_gqa",
    "multi_head_latent_attention",
    "multi_query_attention",
    "prob_reduce",
    "selective_attention",
    "visible_keys",
    "weighted_values",
]
