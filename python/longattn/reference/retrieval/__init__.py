"""Oracles of `longattn.retrieval` and of the indexes."""

from longattn.reference.retrieval.hata_topk_attention import HashAttention, hata_topk_attention
from longattn.reference.retrieval.retrieval_attention import ReadAttention, attention, best_rows, candidates
from longattn.reference.retrieval.signatures import (
    BLOCK,
    STEPS,
    Codes,
    encode,
    estimate,
    rotation,
    unread_log_weights,
)

__all__ = [
    "BLOCK",
    "STEPS",
    "Codes",
    "HashAttention",
    "ReadAttention",
    "attention",
    "best_rows",
    "candidates",
    "encode",
    "estimate",
    "hata_topk_attention",
    "rotation",
    "unread_log_weights",
]
