"""Attention that reads few of a store's rows: those an index picks, with an estimate of the others."""

from longattn.retrieval.recall import recall, recovery_ratio
from longattn.retrieval.retrieval_attention import RetrievalResult, RetrievalStats, retrieval_attention

__all__ = ["RetrievalResult", "RetrievalStats", "recall", "recovery_ratio", "retrieval_attention"]
