"""Oracles of `longattn.retrieval` and of the indexes."""

from longattn.reference.retrieval.hata_topk_attention import HashAttention, hata_topk_attention
from longattn.reference.retrieval.retrieval_attention import ReadAttention, attention, candidates
from longattn.reference.retrieval.signatures import (
    BLOCK,
    STEPS,
    Codes,
    encode,
    estimate,
    rotation,
    unread_log_weights,
)
from longattn.reference.retrieval.units import UnitAttention, page_rows, unit_attention, unit_scores

__all__ = [
    "BLOCK",
    "STEPS",
    "Codes",
    "HashAttention",
    "ReadAttention",
    "UnitAttention",
    "attention",
    "candidates",
    "encode",
    "estimate",
    "hata_topk_attention",
    "page_rows",
    "rotation",
    "unit_attention",
    "unit_scores",
    "unread_log_weights",
]
