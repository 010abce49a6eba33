"""Oracles of `longattn.retrieval` and of the indexes."""

from longattn.reference.retrieval.hata_topk_attention import HashAttention, hata_topk_attention
from longattn.reference.retrieval.landmark_attention import landmark_attention, landmark_weights, rotated
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
    "candidates",
    "encode",
    "estimate",
    "hata_topk_attention",
    "landmark_attention",
    "landmark_weights",
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
    "unit_attention",
    "unit_scores",
    "unread_log_weights",
]
