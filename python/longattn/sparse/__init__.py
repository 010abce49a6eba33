"""Exact attention over chosen keys, what chooses them, and the methods that are both: one module per method."""

from longattn.sparse.anchor_attention import Anchor, anchor_attention
from longattn.sparse.block_mask import BlockMask
from longattn.sparse.block_sparse_attention import block_sparse_attention
from longattn.sparse.dhsa_select import Dhsa, boundary_logits, boundary_ratios, dhsa_select, pick_boundaries
from longattn.sparse.hyper_attention import hyper_attention
from longattn.sparse.index_sparse_attention import index_sparse_attention
from longattn.sparse.lightweight_topk_attention import (
    lightweight_topk_attention,
    lightweight_topk_select,
    next_rho,
    shared_layer,
)
from longattn.sparse.overlapped_chunk_attention import kernel_pool, overlapped_chunk_attention
from longattn.sparse.power_of_two_attention import PowerOfTwo, power_of_two_attention
from longattn.sparse.row_lists import RowLists
from longattn.sparse.sale_select import Sale, sale_select
from longattn.sparse.sparge_attention import Sparge, sparge_attention
from longattn.sparse.sparse_attention import Selector, SparseStats, sparse_attention
from longattn.sparse.transient_global_attention import (
    local_global_attention,
    t5_relative_table,
    transient_global_attention,
)

__all__ = [
    "Anchor",
    "BlockMask",
    "Dhsa",
    "PowerOfTwo",
    "RowLists",
    "Sale",
    "Selector",
    "Sparge",
    "SparseStats",
    "anchor_attention",
    "block_sparse_attention",
    "boundary_logits",
    "boundary_ratios",
    "dhsa_select",
    "hyper_attention",
    "index_sparse_attention",
    "kernel_pool",
    "lightweight_topk_attention",
    "lightweight_topk_select",
    "local_global_attention",
    "next_rho",
    "overlapped_chunk_attention",
    "pick_boundaries",
    "power_of_two_attention",
    "sale_select",
    "shared_layer",
    "sparge_attention",
    "sparse_attention",
    "t5_relative_table",
    "transient_global_attention",
]
