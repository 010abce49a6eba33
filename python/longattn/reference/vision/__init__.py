"""References of `longattn.vision`."""

from longattn.reference.vision.cascaded_group_attention import cascaded_group_attention
from longattn.reference.vision.channel_group_attention import channel_group_attention
from longattn.reference.vision.criss_cross_attention import criss_cross_attention
from longattn.reference.vision.embedding_free_attention import embedding_free_attention
from longattn.reference.vision.focal_modulation import focal_modulation
from longattn.reference.vision.global_query_window_attention import global_query_window_attention
from longattn.reference.vision.long_short_distance_attention import long_short_distance_attention
from longattn.reference.vision.mediator_attention import mediator_attention
from longattn.reference.vision.scale_patch_attention import scale_patch_attention
from longattn.reference.vision.strip_self_attention import strip_self_attention
from longattn.reference.vision.super_token_attention import super_token_attention

__all__ = [
    "cascaded_group_attention",
    "channel_group_attention",
    "criss_cross_attention",
    "embedding_free_attention",
    "focal_modulation",
    "global_query_window_attention",
    "long_short_distance_attention",
    "mediator_attention",
    "scale_patch_attention",
    "strip_self_attention",
    "super_token_attention",
]
