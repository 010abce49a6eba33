"""References of `longattn.vision`."""

from longattn.reference.vision.adaptive_cross_layer_attention import adaptive_cross_layer_attention
from longattn.reference.vision.asymmetric_mixed_attention import asymmetric_mixed_attention
from longattn.reference.vision.attention_guided_crop import (
    attention_guided_crop,
    cls_attention,
    crop_features,
    soft_match,
)
from longattn.reference.vision.attention_rollout_select import (
    attention_rollout,
    attention_rollout_select,
    pair_wise_cross_attention,
)
from longattn.reference.vision.cascaded_group_attention import cascaded_group_attention
from longattn.reference.vision.channel_group_attention import channel_group_attention
from longattn.reference.vision.compositional_quasi_attention import (
    compositional_quasi_attention,
)
from longattn.reference.vision.criss_cross_attention import criss_cross_attention
from longattn.reference.vision.cross_image_attention import (
    cross_image_attention,
    masked_adain,
)
from longattn.reference.vision.deformable_kv_attention_2d import deformable_kv_attention_2d
from longattn.reference.vision.deformable_kv_attention_3d import deformable_kv_attention_3d, point_attention
from longattn.reference.vision.deformable_token_merging import deformable_token_merging
from longattn.reference.vision.distributed_progressive_attention import distributed_progressive_attention
from longattn.reference.vision.embedding_free_attention import embedding_free_attention
from longattn.reference.vision.extended_frame_attention import extended_frame_attention
from longattn.reference.vision.feature_cluster_attention import balanced_clusters, feature_cluster_attention
from longattn.reference.vision.focal_modulation import focal_modulation
from longattn.reference.vision.forward_cross_attention import forward_cross_attention
from longattn.reference.vision.global_query_window_attention import global_query_window_attention
from longattn.reference.vision.hierarchical_global_local_attention import hierarchical_global_local_attention
from longattn.reference.vision.integrative_feature_cost_attention import (
    feature_cost_cross_attention,
    integrative_feature_cost_attention,
)
from longattn.reference.vision.layer_and_channel_spatial_attention import (
    channel_spatial_gate,
    layer_and_channel_spatial_attention,
)
from longattn.reference.vision.local_attention_mamba import (
    local_attention_mamba,
)
from longattn.reference.vision.long_short_distance_attention import long_short_distance_attention
from longattn.reference.vision.match_to_match_additive_attention import match_to_match_additive_attention
from longattn.reference.vision.mediator_attention import mediator_attention
from longattn.reference.vision.nested_attention import nested_attention
from longattn.reference.vision.overlapping_cross_attention import overlapping_cross_attention
from longattn.reference.vision.parallel_self_cross_attention import (
    attentional_pool,
    parallel_self_cross_attention,
    wave_position_encoding,
)
from longattn.reference.vision.partial_visual_attention import (
    partial_visual_attention,
)
from longattn.reference.vision.polyline_path_masked_attention import polyline_mask_apply, polyline_path_masked_attention
from longattn.reference.vision.proxy_token_attention import proxy_token_attention
from longattn.reference.vision.query_shared_cross_attention import query_shared_cross_attention
from longattn.reference.vision.reference_attention import reference_attention
from longattn.reference.vision.regional_cross_attention import regional_cross_attention
from longattn.reference.vision.scale_patch_attention import scale_patch_attention
from longattn.reference.vision.stacked_temporal_attention import stacked_temporal_attention
from longattn.reference.vision.strip_self_attention import strip_self_attention
from longattn.reference.vision.super_token_attention import super_token_attention
from longattn.reference.vision.swapped_window_cross_attention import swapped_window_cross_attention
from longattn.reference.vision.token_coordinated_prompt_attention import token_coordinated_prompt_attention
from longattn.reference.vision.token_pruning import (
    attention_adaptive_pooling,
    diverse_topk,
    gwpr_token_ranking,
    hierarchical_attention_pruning,
    pick_hierarchical,
    projector_sensitivity,
    pyramid_token_pruning,
    split_budget,
    text_guided_vision_pruning,
    vision_scores,
    zeroth_order_token_pruning,
)
from longattn.reference.vision.trajectory_attention import flow_paths, trajectory_attention
from longattn.reference.vision.view_integrated_attention import view_integrated_attention

__all__ = [
    "adaptive_cross_layer_attention",
    "asymmetric_mixed_attention",
    "attention_adaptive_pooling",
    "attention_guided_crop",
    "attention_rollout",
    "attention_rollout_select",
    "attentional_pool",
    "balanced_clusters",
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
    "distributed_progressive_attention",
    "diverse_topk",
    "embedding_free_attention",
    "extended_frame_attention",
    "feature_cluster_attention",
    "feature_cost_cross_attention",
    "flow_paths",
    "focal_modulation",
    "forward_cross_attention",
    "global_query_window_attention",
    "gwpr_token_ranking",
    "hierarchical_attention_pruning",
    "hierarchical_global_local_attention",
    "integrative_feature_cost_attention",
    "layer_and_channel_spatial_attention",
    "local_attention_mamba",
    "long_short_distance_attention",
    "masked_adain",
    "match_to_match_additive_attention",
    "mediator_attention",
    "nested_attention",
    "overlapping_cross_attention",
    "pair_wise_cross_attention",
    "parallel_self_cross_attention",
    "partial_visual_attention",
    "pick_hierarchical",
    "point_attention",
    "polyline_mask_apply",
    "polyline_path_masked_attention",
    "projector_sensitivity",
    "proxy_token_attention",
    "pyramid_token_pruning",
    "query_shared_cross_attention",
    "reference_attention",
    "regional_cross_attention",
    "scale_patch_attention",
    "soft_match",
    "split_budget",
    "stacked_temporal_attention",
    "strip_self_attention",
    "super_token_attention",
    "swapped_window_cross_attention",
    "text_guided_vision_pruning",
    "token_coordinated_prompt_attention",
    "trajectory_attention",
    "view_integrated_attention",
    "vision_scores",
    "wave_position_encoding",
    "zeroth_order_token_pruning",
]
