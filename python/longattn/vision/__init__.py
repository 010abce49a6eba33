"""Attention over images and videos: grids of features, in groups, at sampled places, through pooled tokens.

Features are channels last. Weights are passed in, as a matrix `[inputs, outputs]` or a pair with the bias.
"""

from longattn.vision.adaptive_cross_layer_attention import adaptive_cross_layer_attention
from longattn.vision.asymmetric_mixed_attention import asymmetric_mixed_attention
from longattn.vision.attention_adaptive_pooling import (
    attention_adaptive_pooling,
    pool_keypoints,
)
from longattn.vision.attention_guided_crop import (
    attention_guided_crop,
    cls_attention,
    crop_features,
    soft_match,
)
from longattn.vision.attention_rollout_select import (
    attention_rollout,
    attention_rollout_select,
    pair_wise_cross_attention,
    relevant_tokens,
)
from longattn.vision.cascaded_group_attention import cascaded_group_attention
from longattn.vision.channel_group_attention import channel_group_attention
from longattn.vision.compositional_quasi_attention import (
    compositional_quasi_attention,
)
from longattn.vision.convolution import depthwise_convolution
from longattn.vision.criss_cross_attention import criss_cross_attention
from longattn.vision.cross_image_attention import (
    cross_image_attention,
    masked_adain,
)
from longattn.vision.deformable_kv_attention_2d import deformable_kv_attention_2d
from longattn.vision.deformable_kv_attention_3d import deformable_kv_attention_3d, point_attention
from longattn.vision.deformable_token_merging import deformable_token_merging
from longattn.vision.distributed_progressive_attention import distributed_progressive_attention
from longattn.vision.embedding_free_attention import embedding_free_attention
from longattn.vision.extended_frame_attention import anchored_frames, extended_frame_attention
from longattn.vision.feature_cluster_attention import balanced_clusters, feature_cluster_attention
from longattn.vision.focal_modulation import focal_modulation
from longattn.vision.forward_cross_attention import forward_cross_attention, merge_tokens
from longattn.vision.global_query_window_attention import global_query_window_attention
from longattn.vision.gwpr_token_ranking import (
    TokenRanking,
    gwpr_token_ranking,
    pruned_blocks,
)
from longattn.vision.hierarchical_attention_pruning import (
    hierarchical_attention_pruning,
    pick_hierarchical,
)
from longattn.vision.hierarchical_global_local_attention import hierarchical_global_local_attention
from longattn.vision.integrative_feature_cost_attention import (
    feature_cost_cross_attention,
    integrative_feature_cost_attention,
)
from longattn.vision.layer_and_channel_spatial_attention import (
    channel_spatial_gate,
    layer_and_channel_spatial_attention,
)
from longattn.vision.local_attention_mamba import (
    local_attention_mamba,
)
from longattn.vision.long_short_distance_attention import long_short_distance_attention
from longattn.vision.match_to_match_additive_attention import match_to_match_additive_attention
from longattn.vision.mediator_attention import mediator_attention, mediator_schedule
from longattn.vision.nested_attention import nested_attention
from longattn.vision.overlapping_cross_attention import overlapping_cross_attention
from longattn.vision.parallel_self_cross_attention import (
    attentional_pool,
    attentional_unpool,
    parallel_self_cross_attention,
    wave_position_encoding,
)
from longattn.vision.partial_visual_attention import (
    partial_visual_attention,
)
from longattn.vision.partition import attend_over, grouped_attention, partition, unpartition
from longattn.vision.polyline_path_masked_attention import (
    polyline_decays,
    polyline_mask_apply,
    polyline_path_masked_attention,
)
from longattn.vision.positions import absolute_offset_bias, dynamic_position_bias, relative_position_bias
from longattn.vision.proxy_token_attention import proxy_token_attention, window_members
from longattn.vision.pyramid_token_pruning import pyramid_token_pruning
from longattn.vision.query_shared_cross_attention import query_shared_cross_attention
from longattn.vision.reference_attention import reference_attention
from longattn.vision.regional_cross_attention import (
    box_regions,
    fourier_boxes,
    region_texts,
    regional_cross_attention,
)
from longattn.vision.sample import sample
from longattn.vision.scale_patch_attention import scale_patch_attention
from longattn.vision.stacked_temporal_attention import stacked_temporal_attention
from longattn.vision.strip_self_attention import strip_self_attention
from longattn.vision.super_token_attention import super_token_attention
from longattn.vision.swapped_window_cross_attention import swapped_window_cross_attention
from longattn.vision.text_guided_vision_pruning import (
    attention_shift,
    text_guided_vision_pruning,
    vision_scores,
)
from longattn.vision.token_budgets import (
    budgeted_topk,
    diverse_topk,
    split_budget,
    token_mass,
)
from longattn.vision.token_coordinated_prompt_attention import (
    match_prompts,
    token_coordinated_prompt_attention,
)
from longattn.vision.trajectory_attention import flow_paths, trajectory_attention, trajectory_lists
from longattn.vision.view_integrated_attention import view_integrated_attention
from longattn.vision.zeroth_order_token_pruning import (
    projector_sensitivity,
    zeroth_order_token_pruning,
)

__all__ = [
    "TokenRanking",
    "absolute_offset_bias",
    "adaptive_cross_layer_attention",
    "anchored_frames",
    "asymmetric_mixed_attention",
    "attend_over",
    "attention_adaptive_pooling",
    "attention_guided_crop",
    "attention_rollout",
    "attention_rollout_select",
    "attention_shift",
    "attentional_pool",
    "attentional_unpool",
    "balanced_clusters",
    "box_regions",
    "budgeted_topk",
    "cascaded_group_attention",
    "channel_group_attention",
    "channel_spatial_gate",
    "cls_attention",
    "compositional_quasi_attention",
    "criss_cross_attention",
    "crop_features",
    "cross_image_attention",
    "deformable_kv_attention_2d",
    "deformable_kv_attention_3d",
    "deformable_token_merging",
    "depthwise_convolution",
    "distributed_progressive_attention",
    "diverse_topk",
    "dynamic_position_bias",
    "embedding_free_attention",
    "extended_frame_attention",
    "feature_cluster_attention",
    "feature_cost_cross_attention",
    "flow_paths",
    "focal_modulation",
    "forward_cross_attention",
    "fourier_boxes",
    "global_query_window_attention",
    "grouped_attention",
    "gwpr_token_ranking",
    "hierarchical_attention_pruning",
    "hierarchical_global_local_attention",
    "integrative_feature_cost_attention",
    "layer_and_channel_spatial_attention",
    "local_attention_mamba",
    "long_short_distance_attention",
    "masked_adain",
    "match_prompts",
    "match_to_match_additive_attention",
    "mediator_attention",
    "mediator_schedule",
    "merge_tokens",
    "nested_attention",
    "overlapping_cross_attention",
    "pair_wise_cross_attention",
    "parallel_self_cross_attention",
    "partial_visual_attention",
    "partition",
    "pick_hierarchical",
    "point_attention",
    "polyline_decays",
    "polyline_mask_apply",
    "polyline_path_masked_attention",
    "pool_keypoints",
    "projector_sensitivity",
    "proxy_token_attention",
    "pruned_blocks",
    "pyramid_token_pruning",
    "query_shared_cross_attention",
    "reference_attention",
    "region_texts",
    "regional_cross_attention",
    "relative_position_bias",
    "relevant_tokens",
    "sample",
    "scale_patch_attention",
    "soft_match",
    "split_budget",
    "stacked_temporal_attention",
    "strip_self_attention",
    "super_token_attention",
    "swapped_window_cross_attention",
    "text_guided_vision_pruning",
    "token_coordinated_prompt_attention",
    "token_mass",
    "trajectory_attention",
    "trajectory_lists",
    "unpartition",
    "view_integrated_attention",
    "vision_scores",
    "wave_position_encoding",
    "window_members",
    "zeroth_order_token_pruning",
]
