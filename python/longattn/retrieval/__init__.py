"""Attention that reads few of a store's rows: those an index picks, with an estimate of the others."""

from longattn.retrieval.hata_topk_attention import hata_topk_attention
from longattn.retrieval.landmark_attention import LandmarkCache, LandmarkStats, landmark_attention
from longattn.retrieval.ltri_span_attention import LtriCache, SpanStats, ltri_span_attention
from longattn.retrieval.magicpig_attention import magicpig_attention
from longattn.retrieval.pariskv_attention import pariskv_attention
from longattn.retrieval.pqcache_attention import pqcache_attention
from longattn.retrieval.probe_budgets import ProbedBudgets, probe_budgets
from longattn.retrieval.quest_attention import quest_attention
from longattn.retrieval.recall import recall, recovery_ratio
from longattn.retrieval.retrieval_attention import (
    RetrievalResult,
    RetrievalStats,
    retrieval_attention,
    retrieval_attention_batch,
)
from longattn.retrieval.retro_infer_attention import retro_infer_attention
from longattn.retrieval.s3_feature_retrieve import (
    FeatureIndex,
    RetrievedSpans,
    bm25,
    fuse,
    s3_feature_retrieve,
    sae_topk_features,
    select_spans,
)
from longattn.retrieval.shared_prefix_attention import SharedPrefixResult, shared_prefix_attention
from longattn.retrieval.span_discovery import discover_spans, span_representatives, triangle_scores
from longattn.retrieval.verified_sparse_attention import verified_sparse_attention

__all__ = [
    "FeatureIndex",
    "LandmarkCache",
    "LandmarkStats",
    "LtriCache",
    "ProbedBudgets",
    "RetrievalResult",
    "RetrievalStats",
    "RetrievedSpans",
    "SharedPrefixResult",
    "SpanStats",
    "bm25",
    "discover_spans",
    "fuse",
    "hata_topk_attention",
    "landmark_attention",
    "ltri_span_attention",
    "magicpig_attention",
    "pariskv_attention",
    "pqcache_attention",
    "probe_budgets",
    "quest_attention",
    "recall",
    "recovery_ratio",
    "retrieval_attention",
    "retrieval_attention_batch",
    "retro_infer_attention",
    "s3_feature_retrieve",
    "sae_topk_features",
    "select_spans",
    "shared_prefix_attention",
    "span_representatives",
    "triangle_scores",
    "verified_sparse_attention",
]
