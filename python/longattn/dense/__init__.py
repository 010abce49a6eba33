"""Exact attention and the methods that are it: one module per method."""

from longattn.dense.attention import attention
from longattn.dense.attention_backward import attention_backward, attention_varlen_backward
from longattn.dense.attention_varlen import attention_varlen
from longattn.dense.attention_weights import attention_weights
from longattn.dense.fixed_head_size_attention import ScoreRank, fixed_head_size_attention, score_rank
from longattn.dense.generalized_gaussian_bias_attention import (
    generalized_gaussian_bias_attention,
    generalized_gaussian_table,
)
from longattn.dense.grouped_query_attention import grouped_query_attention, mha_to_gqa
from longattn.dense.head_scaled_nope_attention import head_scaled_nope_attention, matching_lam
from longattn.dense.listed_attention import listed_attention
from longattn.dense.merge import merge
from longattn.dense.multi_head_latent_attention import multi_head_latent_attention
from longattn.dense.multi_query_attention import multi_query_attention
from longattn.dense.prob_reduce import ProbReductions, prob_reduce
from longattn.dense.selective_attention import max_f_kept, selective_attention

__all__ = [
    "ProbReductions",
    "ScoreRank",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_weights",
    "fixed_head_size_attention",
    "generalized_gaussian_bias_attention",
    "generalized_gaussian_table",
    "grouped_query_attention",
    "head_scaled_nope_attention",
    "listed_attention",
    "matching_lam",
    "max_f_kept",
    "merge",
    "mha_to_gqa",
    "multi_head_latent_attention",
    "multi_query_attention",
    "prob_reduce",
    "score_rank",
    "selective_attention",
]
