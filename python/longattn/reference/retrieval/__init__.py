"""Oracles of `longattn.retrieval` and of the indexes."""

from longattn.reference.retrieval.hata_topk_attention import HashAttention, hata_topk_attention
from longattn.reference.retrieval.landmark_attention import landmark_attention, landmark_weights, rotated
from longattn.reference.retrieval.ltri_span_attention import (
    discover_spans,
    ltri_span_attention,
    span_attention,
    triangle_score,
)
from longattn.reference.retrieval.magicpig_attention import SampledAttention, buckets, inclusion, magicpig_attention
from longattn.reference.retrieval.pariskv_attention import VotedAttention, pariskv_attention, patterns, ratios, votes
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
from longattn.reference.retrieval.train_hash_weights import hash_loss
from longattn.reference.retrieval.units import UnitAttention, page_rows, unit_attention, unit_scores

__all__ = [
    "BLOCK",
    "STEPS",
    "Codes",
    "HashAttention",
    "ProductAttention",
    "ProductCodes",
    "ReadAttention",
    "SampledAttention",
    "UnitAttention",
    "VotedAttention",
    "attention",
    "best_rows",
    "bm25",
    "buckets",
    "candidates",
    "discover_spans",
    "encode",
    "estimate",
    "feature_scores",
    "fuse",
    "hash_loss",
    "hata_topk_attention",
    "inclusion",
    "landmark_attention",
    "landmark_weights",
    "ltri_span_attention",
    "magicpig_attention",
    "nearest",
    "page_rows",
    "pariskv_attention",
    "patterns",
    "pqcache_attention",
    "product_attention",
    "product_error",
    "product_logits",
    "quest_attention",
    "ratios",
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
    "votes",
]
