"""Attention that reads few of a store's rows: those an index picks, with an estimate of the others."""

from longattn.retrieval.hata_topk_attention import hata_topk_attention
from longattn.retrieval.magicpig_attention import magicpig_attention
from longattn.retrieval.pariskv_attention import pariskv_attention
from longattn.retrieval.retrieval_attention import RetrievalResult, RetrievalStats, retrieval_attention

__all__ = [
    "RetrievalResult",
    "RetrievalStats",
    "hata_topk_attention",
    "magicpig_attention",
    "pariskv_attention",
    "retrieval_attention",
]
