"""Oracles of `longattn.diagnostics`."""

from longattn.reference.diagnostics.attention_distances import attention_distances
from longattn.reference.diagnostics.echo_induction_scores import echo_induction_scores
from longattn.reference.diagnostics.flux_route import flux_route, routed_attention
from longattn.reference.diagnostics.less_is_more_select import less_is_more_select
from longattn.reference.diagnostics.qada_head_gate import qada_attention, qada_share
from longattn.reference.diagnostics.retrieval_head_score import retrieval_head_score

__all__ = [
    "attention_distances",
    "echo_induction_scores",
    "flux_route",
    "less_is_more_select",
    "qada_attention",
    "qada_share",
    "retrieval_head_score",
    "routed_attention",
]
