"""References of `longattn.sparse`."""

from longattn.reference.sparse.anchor_attention import anchor_attention, anchor_margins
from longattn.reference.sparse.block_sparse_attention import block_sparse_attention
from longattn.reference.sparse.descriptor_attention import descriptor_attention
from longattn.reference.sparse.dhsa_select import boundary_labels, boundary_logits, dhsa_select, pick_boundaries
from longattn.reference.sparse.dilated_neighborhood_attention import dilated_neighborhood_attention
from longattn.reference.sparse.dynamic_block_topk import dynamic_block_topk, dynamic_blocks
from longattn.reference.sparse.flex_prefill import flex_blocks, flex_divergence, flex_prefill
from longattn.reference.sparse.generalized_neighborhood_attention import (
    generalized_neighborhood_attention,
    neighborhood_bias,
    neighborhood_mask,
    spread,
    window_tokens,
)
from longattn.reference.sparse.halo_attention import halo_attention
from longattn.reference.sparse.hyper_attention import hyper_attention
from longattn.reference.sparse.index_sparse_attention import index_sparse_attention
from longattn.reference.sparse.lightweight_topk_attention import (
    lightweight_topk_attention,
    lightweight_topk_logits,
)
from longattn.reference.sparse.minference_vertical_slash import minference_vertical_slash, vertical_slash_mask
from longattn.reference.sparse.moba_select import moba_select
from longattn.reference.sparse.native_sparse_attention import native_sparse_attention, nsa_blocks
from longattn.reference.sparse.neighborhood_attention_unfused import (
    na_av,
    na_av_backward,
    na_qk,
    na_qk_backward,
    neighborhood_attention_unfused,
)
from longattn.reference.sparse.overlapped_chunk_attention import kernel_pool, overlapped_chunk_attention
from longattn.reference.sparse.pooled_block_select_cdf import patch_mask, pooled_block_select_cdf
from longattn.reference.sparse.power_of_two_attention import power_of_two_attention, power_of_two_mask
from longattn.reference.sparse.prefix_global_attention import prefix_global_attention
from longattn.reference.sparse.rectified_block_sparse import rectified_block_sparse
from longattn.reference.sparse.sale_select import sale_estimates, sale_kept, sale_select
from longattn.reference.sparse.sparge_attention import sparge_attention, sparge_blocks, sparge_scores
from longattn.reference.sparse.strided_fixed_sparse_attention import (
    strided_fixed_mask,
    strided_fixed_sparse_attention,
)
from longattn.reference.sparse.transient_global_attention import (
    local_global_attention,
    t5_bucket,
    transient_global_attention,
)
from longattn.reference.sparse.vmoba_select import block_numbers, vmoba_select, vmoba_taken
from longattn.reference.sparse.windowed_attention import windowed_attention
from longattn.reference.sparse.xattention import xattention, xattention_blocks, xattention_mass

__all__ = [
    "anchor_attention",
    "anchor_margins",
    "block_numbers",
    "block_sparse_attention",
    "boundary_labels",
    "boundary_logits",
    "descriptor_attention",
    "dhsa_select",
    "dilated_neighborhood_attention",
    "dynamic_block_topk",
    "dynamic_blocks",
    "flex_blocks",
    "flex_divergence",
    "flex_prefill",
    "generalized_neighborhood_attention",
    "halo_attention",
    "hyper_attention",
    "index_sparse_attention",
    "kernel_pool",
    "lightweight_topk_attention",
    "lightweight_topk_logits",
    "local_global_attention",
    "minference_vertical_slash",
    "moba_select",
    "na_av",
    "na_av_backward",
    "na_qk",
    "na_qk_backward",
    "native_sparse_attention",
    "neighborhood_attention_unfused",
    "neighborhood_bias",
    "neighborhood_mask",
    "nsa_blocks",
    "overlapped_chunk_attention",
    "patch_mask",
    "pick_boundaries",
    "pooled_block_select_cdf",
    "power_of_two_attention",
    "power_of_two_mask",
    "prefix_global_attention",
    "rectified_block_sparse",
    "sale_estimates",
    "sale_kept",
    "sale_select",
    "sparge_attention",
    "sparge_blocks",
    "sparge_scores",
    "spread",
    "strided_fixed_mask",
    "strided_fixed_sparse_attention",
    "t5_bucket",
    "transient_global_attention",
    "vertical_slash_mask",
    "vmoba_select",
    "vmoba_taken",
    "window_tokens",
    "windowed_attention",
    "xattention",
    "xattention_blocks",
    "xattention_mass",
]
