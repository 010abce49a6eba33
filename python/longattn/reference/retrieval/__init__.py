"""Oracles of `longattn.retrieval` and of the indexes."""

from longattn.reference.retrieval.hata_topk_attention import HashAttention, hata_topk_attention
from longattn.reference.retrieval.magicpig_attention import SampledAttention, buckets, inclusion, magicpig_attention
from longattn.reference.retrieval.pariskv_attention import VotedAttention, pariskv_attention, patterns, ratios, votes
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
from longattn.reference.retrieval.train_hash_weights import hash_loss

__all__ = [
    "BLOCK",
    "STEPS",
    "Codes",
    "HashAttention",
    "ReadAttention",
    "SampledAttention",
    "VotedAttention",
    "attention",
    "buckets",
    "candidates",
    "encode",
    "estimate",
    "hash_loss",
    "hata_topk_attention",
    "inclusion",
    "magicpig_attention",
    "pariskv_attention",
    "patterns",
    "ratios",
    "rotation",
    "unread_log_weights",
    "votes",
]
