"""Attention that reads few of a store's rows: those an index picks, with an estimate of the others."""

from longattn.retrieval.retrieval_attention import RetrievalResult, RetrievalStats, retrieval_attention
from longattn.retrieval.verified_sparse_attention import verified_sparse_attention

__all__ = ["RetrievalResult", "RetrievalStats", "retrieval_attention", "verified_sparse_attention"]
