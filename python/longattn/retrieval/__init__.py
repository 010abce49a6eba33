"""Attention that reads few of a store's rows: those an index picks, with an estimate of the others."""

from longattn.retrieval.hata_topk_attention import hata_topk_attention
from longattn.retrieval.landmark_attention import LandmarkCache, LandmarkStats, landmark_attention
from longattn.retrieval.magicpig_attention import magicpig_attention
from longattn.retrieval.pariskv_attention import pariskv_attention
from longattn.retrieval.pqcache_attention import pqcache_attention
from longattn.retrieval.quest_attention import quest_attention
from longattn.retrieval.recall import recall, recovery_ratio
from longattn.retrieval.retrieval_attention import RetrievalResult, RetrievalStats, retrieval_attention
from longattn.retrieval.retro_infer_attention import retro_infer_attention
from longattn.retrieval.verified_sparse_attention import verified_sparse_attention

__all__ = [
    "LandmarkCache",
    "LandmarkStats",
    "RetrievalResult",
    "RetrievalStats",
    "hata_topk_attention",
    "landmark_attention",
    "magicpig_attention",
    "pariskv_attention",
    "pqcache_attention",
    "quest_attention",
    "recall",
    "recovery_ratio",
    "retrieval_attention",
    "retro_infer_attention",
    "verified_sparse_attention",
]
