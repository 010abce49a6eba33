"""Exact attention over chosen keys, what chooses them, and the methods that are both: one module per method."""

from longattn.sparse.anchor_attention import Anchor, anchor_attention
from longattn.sparse.block_mask import BlockMask
from longattn.sparse.block_sparse_attention import block_sparse_attention
from longattn.sparse.block_sparse_attention_backward import block_sparse_attention_backward
from longattn.sparse.composed import Composable, Intersection, PerHead, Union
from longattn.sparse.descriptor_attention import (
    DescriptorAttention,
    descriptor_attention,
    pick_keyframes,
    resize_patches,
)
from longattn.sparse.dhsa_select import Dhsa, boundary_logits, boundary_ratios, dhsa_select, pick_boundaries
from longattn.sparse.dilated_neighborhood_attention import (
    dilated_neighborhood_attention,
    dinat_dilations,
    receptive_field,
)
from longattn.sparse.dynamic_block_topk import DynamicBlocks, dynamic_block_topk
from longattn.sparse.flex_prefill import FlexPrefill, flex_prefill
from longattn.sparse.generalized_neighborhood_attention import (
    TileStats,
    generalized_neighborhood_attention,
    gna_tile_stats,
    visible_tokens,
)
from longattn.sparse.halo_attention import halo_attention
from longattn.sparse.halo_attention_backward import HaloGradients, halo_attention_backward
from longattn.sparse.hyper_attention import hyper_attention
from longattn.sparse.index_sparse_attention import index_sparse_attention
from longattn.sparse.lightweight_topk_attention import (
    lightweight_topk_attention,
    lightweight_topk_select,
    next_rho,
    shared_layer,
)
from longattn.sparse.minference_vertical_slash import VerticalSlash, minference_vertical_slash
from longattn.sparse.moba_select import Moba, moba_select
from longattn.sparse.native_sparse_attention import native_sparse_attention
from longattn.sparse.neighborhood_attention_backward import (
    NeighborhoodGradients,
    neighborhood_attention_backward,
)
from longattn.sparse.neighborhood_attention_unfused import na_av, na_qk, neighborhood_attention_unfused
from longattn.sparse.neighborhood_attention_unfused_backward import na_av_backward, na_qk_backward
from longattn.sparse.overlapped_chunk_attention import kernel_pool, overlapped_chunk_attention
from longattn.sparse.pooled_block_select_cdf import hilbert_order, pooled_block_select_cdf
from longattn.sparse.power_of_two_attention import PowerOfTwo, power_of_two_attention
from longattn.sparse.prefix_global_attention import prefix_global_attention
from longattn.sparse.rectified_block_sparse import rectified_block_sparse
from longattn.sparse.row_lists import RowLists
from longattn.sparse.sale_select import Sale, sale_select
from longattn.sparse.sparge_attention import Sparge, sparge_attention
from longattn.sparse.sparse_attention import Selector, SparseStats, sparse_attention
from longattn.sparse.strided_fixed_sparse_attention import (
    StridedFixed,
    fixed_lists,
    strided_fixed_sparse_attention,
)
from longattn.sparse.transient_global_attention import (
    local_global_attention,
    t5_relative_table,
    transient_global_attention,
)
from longattn.sparse.vmoba_select import vmoba_blocks, vmoba_partition, vmoba_select
from longattn.sparse.windowed_attention import windowed_attention
from longattn.sparse.windowed_attention_backward import windowed_attention_backward
from longattn.sparse.xattention import Antidiagonal, xattention

__all__ = [
    "Anchor",
    "Antidiagonal",
    "BlockMask",
    "Composable",
    "DescriptorAttention",
    "Dhsa",
    "DynamicBlocks",
    "FlexPrefill",
    "HaloGradients",
    "Intersection",
    "Moba",
    "NeighborhoodGradients",
    "PerHead",
    "PowerOfTwo",
    "RowLists",
    "Sale",
    "Selector",
    "Sparge",
    "SparseStats",
    "StridedFixed",
    "TileStats",
    "Union",
    "VerticalSlash",
    "anchor_attention",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "boundary_logits",
    "boundary_ratios",
    "descriptor_attention",
    "dhsa_select",
    "dilated_neighborhood_attention",
    "dinat_dilations",
    "dynamic_block_topk",
    "fixed_lists",
    "flex_prefill",
    "generalized_neighborhood_attention",
    "gna_tile_stats",
    "halo_attention",
    "halo_attention_backward",
    "hilbert_order",
    "hyper_attention",
    "index_sparse_attention",
    "kernel_pool",
    "lightweight_topk_attention",
    "lightweight_topk_select",
    "local_global_attention",
    "minference_vertical_slash",
    "moba_select",
    "na_av",
    "na_av_backward",
    "na_qk",
    "na_qk_backward",
    "native_sparse_attention",
    "neighborhood_attention_backward",
    "neighborhood_attention_unfused",
    "next_rho",
    "overlapped_chunk_attention",
    "pick_boundaries",
    "pick_keyframes",
    "pooled_block_select_cdf",
    "power_of_two_attention",
    "prefix_global_attention",
    "receptive_field",
    "rectified_block_sparse",
    "resize_patches",
    "sale_select",
    "shared_layer",
    "sparge_attention",
    "sparse_attention",
    "strided_fixed_sparse_attention",
    "t5_relative_table",
    "transient_global_attention",
    "visible_tokens",
    "vmoba_blocks",
    "vmoba_partition",
    "vmoba_select",
    "windowed_attention",
    "windowed_attention_backward",
    "xattention",
]
