"""Oracles of `longattn.retrieval` and of the indexes."""

from longattn.reference.retrieval.hata_topk_attention import HashAttention, hata_topk_attention
from longattn.reference.retrieval.landmark_attention import landmark_attention, landmark_weights, rotated
from longattn.reference.retrieval.ltri_span_attention import (
    discover_spans,
    ltri_span_attention,
    span_attention,
    triangle_score,
)
from longattn.reference.retrieval.pqcache_attention import pqcache_attention
from longattn.reference.retrieval.product_quantisation import (
    ProductAttention,
    ProductCodes,
    nearest,
    product_attention,
    product_error,
    product_logits,
)
from longattn.reference.retrieval.quest_attention import quest_attention
from longattn.reference.retrieval.retrieval_attention import ReadAttention, attention, best_rows, candidates
from longattn.reference.retrieval.retro_infer_attention import retro_infer_attention
from longattn.reference.retrieval.s3_feature_retrieve import (
    bm25,
    feature_scores,
    fuse,
    s3_feature_retrieve,
    sae_features,
    spans_of,
)
from longattn.reference.retrieval.signatures import BLOCK, STEPS, Codes, encode, estimate, rotation, unread_log_weights
from longattn.reference.retrieval.units import UnitAttention, page_rows, unit_attention, unit_scores

__all__ = [
    "BLOCK",
    "STEPS",
    "Codes",
    "HashAttention",
    "ProductAttention",
    "ProductCodes",
    "ReadAttention",
    "UnitAttention",
    "attention",
    "best_rows",
    "bm25",
    "candidates",
    "discover_spans",
    "encode",
    "estimate",
    "feature_scores",
    "fuse",
    "hata_topk_attention",
    "landmark_attention",
    "landmark_weights",
    "ltri_span_attention",
    "nearest",
    "page_rows",
    "pqcache_attention",
    "product_attention",
    "product_error",
    "product_logits",
    "quest_attention",
    "retro_infer_attention",
    "rotated",
    "rotation",
    "s3_feature_retrieve",
    "sae_features",
    "span_attention",
    "spans_of",
    "triangle_score",
    "unit_attention",
    "unit_scores",
    "unread_log_weights",
]
