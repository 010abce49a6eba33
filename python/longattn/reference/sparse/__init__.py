"""References of `longattn.sparse`."""

from longattn.reference.sparse.anchor_attention import anchor_attention, anchor_margins
from longattn.reference.sparse.dhsa_select import boundary_labels, boundary_logits, dhsa_select, pick_boundaries
from longattn.reference.sparse.dilated_neighborhood_attention import dilated_neighborhood_attention
from longattn.reference.sparse.generalized_neighborhood_attention import (
    generalized_neighborhood_attention,
    neighborhood_bias,
    neighborhood_mask,
    spread,
    window_tokens,
)
from longattn.reference.sparse.halo_attention import halo_attention
from longattn.reference.sparse.hyper_attention import hyper_attention
from longattn.reference.sparse.lightweight_topk_attention import (
    lightweight_topk_attention,
    lightweight_topk_logits,
)
from longattn.reference.sparse.neighborhood_attention_unfused import na_av, na_qk, neighborhood_attention_unfused
from longattn.reference.sparse.overlapped_chunk_attention import kernel_pool, overlapped_chunk_attention
from longattn.reference.sparse.power_of_two_attention import power_of_two_attention, power_of_two_mask
from longattn.reference.sparse.sale_select import sale_estimates, sale_kept, sale_select
from longattn.reference.sparse.sparge_attention import sparge_attention, sparge_blocks, sparge_scores
from longattn.reference.sparse.transient_global_attention import (
    local_global_attention,
    t5_bucket,
    transient_global_attention,
)

__all__ = [
    "anchor_attention",
    "anchor_margins",
    "boundary_labels",
    "boundary_logits",
    "dhsa_select",
    "dilated_neighborhood_attention",
    "generalized_neighborhood_attention",
    "halo_attention",
    "hyper_attention",
    "kernel_pool",
    "lightweight_topk_attention",
    "lightweight_topk_logits",
    "local_global_attention",
    "na_av",
    "na_qk",
    "neighborhood_attention_unfused",
    "neighborhood_bias",
    "neighborhood_mask",
    "overlapped_chunk_attention",
    "pick_boundaries",
    "power_of_two_attention",
    "power_of_two_mask",
    "sale_estimates",
    "sale_kept",
    "sale_select",
    "sparge_attention",
    "sparge_blocks",
    "sparge_scores",
    "spread",
    "t5_bucket",
    "transient_global_attention",
    "window_tokens",
]
