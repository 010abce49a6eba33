"""What heads do, which of them need what, and whether vectors suit an index: scores, gates and routes."""

from longattn.diagnostics.attention_distances import DistanceProfile, attention_distances
from longattn.diagnostics.echo_induction_scores import alibi_scope, echo_induction_scores, razor_heads
from longattn.diagnostics.flux_route import flux_route, routed_attention
from longattn.diagnostics.less_is_more_select import less_is_more_attention, less_is_more_select
from longattn.diagnostics.out_of_distribution import mahalanobis
from longattn.diagnostics.qada_head_gate import KeyMoments, QadaStats, key_moments, qada_attention, qada_gate
from longattn.diagnostics.retrieval_head_score import RetrievalScores, mask_heads, retrieval_head_score, top_keys

__all__ = [
    "DistanceProfile",
    "KeyMoments",
    "QadaStats",
    "RetrievalScores",
    "alibi_scope",
    "attention_distances",
    "echo_induction_scores",
    "flux_route",
    "key_moments",
    "less_is_more_attention",
    "less_is_more_select",
    "mahalanobis",
    "mask_heads",
    "qada_attention",
    "qada_gate",
    "razor_heads",
    "retrieval_head_score",
    "routed_attention",
    "top_keys",
]
