"""Linear attention: states of fixed size in place of a cache that grows."""

from longattn.linear._fast_weight import MemoryState
from longattn.linear._running import LocalState, RunningStatistics
from longattn.linear._titans_layer import TitansWeights
from longattn.linear.adaptive_frequency_filter import adaptive_frequency_filter
from longattn.linear.agent_attention import agent_attention, agent_biases
from longattn.linear.based import based
from longattn.linear.bidirectional_gated_ssm import DiagonalSsm, bidirectional_gated_ssm
from longattn.linear.bidirectional_mamba import bidirectional_mamba
from longattn.linear.blended_softmax_linear_attention import blended_softmax_linear_attention
from longattn.linear.causal_efficient_attention import RunningSoftmax, causal_efficient_attention
from longattn.linear.causal_fastmax_attention import causal_fastmax_attention
from longattn.linear.causal_focused_linear_attention import causal_focused_linear_attention
from longattn.linear.causal_inline_attention import causal_inline_attention
from longattn.linear.causal_l2vit_linear_attention import causal_l2vit_linear_attention
from longattn.linear.causal_magnitude_aware_linear_attention import causal_magnitude_aware_linear_attention
from longattn.linear.causal_performer_attention import causal_performer_attention
from longattn.linear.causal_simplified_linear_attention import causal_simplified_linear_attention
from longattn.linear.convolution import causal_conv1d, depthwise_conv1d, depthwise_conv2d, dynamic_conv
from longattn.linear.delta_rule_attention import delta_rule_attention
from longattn.linear.diagonal_scan import diagonal_scan
from longattn.linear.diagonal_scan_backward import DiagonalScanGradients, diagonal_scan_backward
from longattn.linear.each_sequence import each_sequence
from longattn.linear.efficient_attention import efficient_attention
from longattn.linear.fastmax_attention import fastmax_attention
from longattn.linear.feature_map import FeatureMap
from longattn.linear.flare_attention import FlareState, flare_attention, flare_gather, flare_read
from longattn.linear.focused_linear_attention import focused_linear_attention
from longattn.linear.gated_associative_memory import gated_associative_memory
from longattn.linear.gated_delta_rule import gated_delta_rule
from longattn.linear.gated_linear_attention import gated_linear_attention
from longattn.linear.gated_slot_attention import gated_slot_attention
from longattn.linear.grouped_linear_attention_local_conv import GroupState, grouped_linear_attention_local_conv
from longattn.linear.hgrn2 import hgrn2
from longattn.linear.hyena_pixel_conv import hyena_pixel_conv, hyena_pixel_kernel
from longattn.linear.inline_attention import inline_attention, inline_local_weights
from longattn.linear.kernelized_rpe_attention import kernelized_rpe_attention
from longattn.linear.key_statistics import KeyStatistics, key_statistics, read_statistics
from longattn.linear.kimi_delta_attention import kimi_delta_attention, kimi_delta_gates
from longattn.linear.l2vit_linear_attention import l2vit_linear_attention
from longattn.linear.lasp2_linear_attention import (
    LaspStats,
    lasp2_hybrid_attention,
    lasp2_linear_attention,
    lasp2_linear_attention_backward,
)
from longattn.linear.lasp2_shards import exclusive_states, shard_state
from longattn.linear.lightning_attention import lightning_attention, lightning_slopes
from longattn.linear.linear_attention import linear_attention
from longattn.linear.linear_match_attention import dual_softmax_matches, linear_match_attention, refine_matches
from longattn.linear.local_concentration import local_concentration
from longattn.linear.local_linear_attention import LocalLinearStats, local_linear_attention
from longattn.linear.magnitude_aware_linear_attention import magnitude_aware_linear_attention, rope_2d_angles
from longattn.linear.mamba_mixer import MambaState, MambaWeights, mamba_mixer
from longattn.linear.mega_gated_attention import MegaState, MegaWeights, mega_gated_attention
from longattn.linear.miras_memory import miras_memory
from longattn.linear.miras_retention import miras_retention, read_lq
from longattn.linear.multi_dim_damped_ema import multi_dim_damped_ema
from longattn.linear.performer_attention import performer_attention, random_directions
from longattn.linear.recurrence_backward import RecurrenceGradients, recurrence_backward
from longattn.linear.regla import regla
from longattn.linear.retention import retention
from longattn.linear.reverse_attention_gate import reverse_attention_gate, tri_plane_scan
from longattn.linear.rwkv6 import rwkv6
from longattn.linear.rwkv7 import rwkv7
from longattn.linear.selective_scan import selective_scan
from longattn.linear.selective_scan_backward import SelectiveScanGradients, selective_scan_backward
from longattn.linear.selective_token_channel_mixer import selective_token_channel_mixer
from longattn.linear.shared_time_frequency_attention import shared_time_frequency_attention
from longattn.linear.simplified_linear_attention import fold_rep_batch_norm, rep_batch_norm, simplified_linear_attention
from longattn.linear.span_dynamic_convolution import SpanState, span_dynamic_convolution
from longattn.linear.state_space_duality import state_space_duality
from longattn.linear.taipan_selective_attention import taipan_selective_attention
from longattn.linear.titans_memory_as_context import titans_memory_as_context
from longattn.linear.titans_memory_as_gate import titans_memory_as_gate
from longattn.linear.titans_memory_as_layer import titans_memory_as_layer
from longattn.linear.titans_neural_memory import titans_neural_memory
from longattn.linear.toeplitz import toeplitz, toeplitz2d
from longattn.linear.token_tree import TreeVerification, verify_tree
from longattn.linear.ttt_linear import ttt_linear

__all__ = [
    "DiagonalScanGradients",
    "DiagonalSsm",
    "FeatureMap",
    "FlareState",
    "GroupState",
    "KeyStatistics",
    "LaspStats",
    "LocalLinearStats",
    "LocalState",
    "MambaState",
    "MambaWeights",
    "MegaState",
    "MegaWeights",
    "MemoryState",
    "RecurrenceGradients",
    "RunningSoftmax",
    "RunningStatistics",
    "SelectiveScanGradients",
    "SpanState",
    "TitansWeights",
    "TreeVerification",
    "adaptive_frequency_filter",
    "agent_attention",
    "agent_biases",
    "based",
    "bidirectional_gated_ssm",
    "bidirectional_mamba",
    "blended_softmax_linear_attention",
    "causal_conv1d",
    "causal_efficient_attention",
    "causal_fastmax_attention",
    "causal_focused_linear_attention",
    "causal_inline_attention",
    "causal_l2vit_linear_attention",
    "causal_magnitude_aware_linear_attention",
    "causal_performer_attention",
    "causal_simplified_linear_attention",
    "delta_rule_attention",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "diagonal_scan",
    "diagonal_scan_backward",
    "dual_softmax_matches",
    "dynamic_conv",
    "each_sequence",
    "efficient_attention",
    "exclusive_states",
    "fastmax_attention",
    "flare_attention",
    "flare_gather",
    "flare_read",
    "focused_linear_attention",
    "fold_rep_batch_norm",
    "gated_associative_memory",
    "gated_delta_rule",
    "gated_linear_attention",
    "gated_slot_attention",
    "grouped_linear_attention_local_conv",
    "hgrn2",
    "hyena_pixel_conv",
    "hyena_pixel_kernel",
    "inline_attention",
    "inline_local_weights",
    "kernelized_rpe_attention",
    "key_statistics",
    "kimi_delta_attention",
    "kimi_delta_gates",
    "l2vit_linear_attention",
    "lasp2_hybrid_attention",
    "lasp2_linear_attention",
    "lasp2_linear_attention_backward",
    "lightning_attention",
    "lightning_slopes",
    "linear_attention",
    "linear_match_attention",
    "local_concentration",
    "local_linear_attention",
    "magnitude_aware_linear_attention",
    "mamba_mixer",
    "mega_gated_attention",
    "miras_memory",
    "miras_retention",
    "multi_dim_damped_ema",
    "performer_attention",
    "random_directions",
    "read_lq",
    "read_statistics",
    "recurrence_backward",
    "refine_matches",
    "regla",
    "rep_batch_norm",
    "retention",
    "reverse_attention_gate",
    "rope_2d_angles",
    "rwkv6",
    "rwkv7",
    "selective_scan",
    "selective_scan_backward",
    "selective_token_channel_mixer",
    "shard_state",
    "shared_time_frequency_attention",
    "simplified_linear_attention",
    "span_dynamic_convolution",
    "state_space_duality",
    "taipan_selective_attention",
    "titans_memory_as_context",
    "titans_memory_as_gate",
    "titans_memory_as_layer",
    "titans_neural_memory",
    "toeplitz",
    "toeplitz2d",
    "tri_plane_scan",
    "ttt_linear",
    "verify_tree",
]
