"""References of `longattn.vision`."""

from longattn.reference.vision.cascaded_group_attention import cascaded_group_attention
from longattn.reference.vision.channel_group_attention import channel_group_attention
from longattn.reference.vision.criss_cross_attention import criss_cross_attention
from longattn.reference.vision.deformable_kv_attention_2d import deformable_kv_attention_2d
from longattn.reference.vision.deformable_kv_attention_3d import deformable_kv_attention_3d, point_attention
from longattn.reference.vision.deformable_token_merging import deformable_token_merging
from longattn.reference.vision.distributed_progressive_attention import distributed_progressive_attention
from longattn.reference.vision.embedding_free_attention import embedding_free_attention
from longattn.reference.vision.feature_cluster_attention import balanced_clusters, feature_cluster_attention
from longattn.reference.vision.focal_modulation import focal_modulation
from longattn.reference.vision.global_query_window_attention import global_query_window_attention
from longattn.reference.vision.long_short_distance_attention import long_short_distance_attention
from longattn.reference.vision.mediator_attention import mediator_attention
from longattn.reference.vision.proxy_token_attention import proxy_token_attention
from longattn.reference.vision.scale_patch_attention import scale_patch_attention
from longattn.reference.vision.strip_self_attention import strip_self_attention
from longattn.reference.vision.super_token_attention import super_token_attention
from longattn.reference.vision.trajectory_attention import flow_paths, trajectory_attention

__all__ = [
    "balanced_clusters",
    "cascaded_group_attention",
    "channel_group_attention",
    "criss_cross_attention",
    "deformable_kv_attention_2d",
    "deformable_kv_attention_3d",
    "deformable_token_merging",
    "distributed_progressive_attention",
    "embedding_free_attention",
    "feature_cluster_attention",
    "flow_paths",
    "focal_modulation",
    "global_query_window_attention",
    "long_short_distance_attention",
    "mediator_attention",
    "point_attention",
    "proxy_token_attention",
    "scale_patch_attention",
    "strip_self_attention",
    "super_token_attention",
    "trajectory_attention",
]
