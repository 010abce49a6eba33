"""Oracles of `longattn.linear`."""

from longattn.reference.linear.adaptive_frequency_filter import adaptive_frequency_filter
from longattn.reference.linear.agent_attention import agent_attention
from longattn.reference.linear.based import based
from longattn.reference.linear.bidirectional_gated_ssm import bidirectional_gated_ssm
from longattn.reference.linear.blended_softmax_linear_attention import blended_softmax_linear_attention
from longattn.reference.linear.causal_fastmax_attention import causal_fastmax_attention
from longattn.reference.linear.causal_forms import (
    causal,
    causal_convolution,
    causal_efficient_attention,
    causal_focused_linear_attention,
    causal_inline_attention,
    causal_l2vit_linear_attention,
    causal_magnitude_aware_linear_attention,
    causal_simplified_linear_attention,
)
from longattn.reference.linear.causal_performer_attention import causal_performer_attention
from longattn.reference.linear.convolution import depthwise, diagonal_scan, dynamic_conv, toeplitz, toeplitz2d
from longattn.reference.linear.delta_rule_attention import delta_rule_attention
from longattn.reference.linear.diagonal_scan_backward import diagonal_scan_backward
from longattn.reference.linear.efficient_attention import efficient_attention
from longattn.reference.linear.fastmax_attention import fastmax_attention
from longattn.reference.linear.features import features
from longattn.reference.linear.flare_attention import flare_attention
from longattn.reference.linear.focused_linear_attention import focused_linear_attention
from longattn.reference.linear.gated_associative_memory import gated_associative_memory
from longattn.reference.linear.gated_delta_rule import gated_delta_rule
from longattn.reference.linear.gated_linear_attention import gated_linear_attention
from longattn.reference.linear.gated_slot_attention import gated_slot_attention
from longattn.reference.linear.grouped_linear_attention_local_conv import grouped_linear_attention_local_conv
from longattn.reference.linear.hgrn2 import hgrn2
from longattn.reference.linear.hyena_pixel_conv import hyena_pixel_conv
from longattn.reference.linear.inline_attention import inline_attention
from longattn.reference.linear.kernelized_rpe_attention import kernelized_rpe_attention
from longattn.reference.linear.kimi_delta_attention import kimi_delta_attention
from longattn.reference.linear.l2vit_linear_attention import l2vit_linear_attention
from longattn.reference.linear.lasp2_linear_attention import lasp2_linear_attention, lasp2_linear_attention_backward
from longattn.reference.linear.lightning_attention import lightning_attention
from longattn.reference.linear.linear_attention import linear_attention
from longattn.reference.linear.linear_match_attention import dual_softmax, linear_match_attention
from longattn.reference.linear.local_concentration import local_concentration
from longattn.reference.linear.local_linear_attention import local_linear_attention
from longattn.reference.linear.magnitude_aware_linear_attention import magnitude_aware_linear_attention
from longattn.reference.linear.mamba_mixer import bidirectional_mamba, mamba_mixer, selective_token_channel_mixer
from longattn.reference.linear.mega_gated_attention import mega_gated_attention, multi_dim_damped_ema
from longattn.reference.linear.miras_memory import miras_memory
from longattn.reference.linear.performer_attention import performer_attention
from longattn.reference.linear.recurrence_backward import recurrence_backward
from longattn.reference.linear.regla import regla
from longattn.reference.linear.retention import retention
from longattn.reference.linear.reverse_attention_gate import reverse_attention_gate
from longattn.reference.linear.rwkv6 import rwkv6
from longattn.reference.linear.rwkv7 import rwkv7
from longattn.reference.linear.selective_scan import selective_scan
from longattn.reference.linear.selective_scan_backward import selective_scan_backward
from longattn.reference.linear.shared_time_frequency_attention import shared_time_frequency_attention
from longattn.reference.linear.simplified_linear_attention import rep_batch_norm, simplified_linear_attention
from longattn.reference.linear.span_dynamic_convolution import span_dynamic_convolution
from longattn.reference.linear.state_space_duality import state_space_duality
from longattn.reference.linear.taipan_selective_attention import taipan_selective_attention
from longattn.reference.linear.titans_layers import (
    titans_memory_as_context,
    titans_memory_as_gate,
    titans_memory_as_layer,
)
from longattn.reference.linear.titans_neural_memory import titans_neural_memory
from longattn.reference.linear.ttt_linear import ttt_linear

__all__ = [
    "adaptive_frequency_filter",
    "agent_attention",
    "based",
    "bidirectional_gated_ssm",
    "bidirectional_mamba",
    "blended_softmax_linear_attention",
    "causal",
    "causal_convolution",
    "causal_efficient_attention",
    "causal_fastmax_attention",
    "causal_focused_linear_attention",
    "causal_inline_attention",
    "causal_l2vit_linear_attention",
    "causal_magnitude_aware_linear_attention",
    "causal_performer_attention",
    "causal_simplified_linear_attention",
    "delta_rule_attention",
    "depthwise",
    "diagonal_scan",
    "diagonal_scan_backward",
    "dual_softmax",
    "dynamic_conv",
    "efficient_attention",
    "fastmax_attention",
    "features",
    "flare_attention",
    "focused_linear_attention",
    "gated_associative_memory",
    "gated_delta_rule",
    "gated_linear_attention",
    "gated_slot_attention",
    "grouped_linear_attention_local_conv",
    "hgrn2",
    "hyena_pixel_conv",
    "inline_attention",
    "kernelized_rpe_attention",
    "kimi_delta_attention",
    "l2vit_linear_attention",
    "lasp2_linear_attention",
    "lasp2_linear_attention_backward",
    "lightning_attention",
    "linear_attention",
    "linear_match_attention",
    "local_concentration",
    "local_linear_attention",
    "magnitude_aware_linear_attention",
    "mamba_mixer",
    "mega_gated_attention",
    "miras_memory",
    "multi_dim_damped_ema",
    "performer_attention",
    "recurrence_backward",
    "regla",
    "rep_batch_norm",
    "retention",
    "reverse_attention_gate",
    "rwkv6",
    "rwkv7",
    "selective_scan",
    "selective_scan_backward",
    "selective_token_channel_mixer",
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
    "ttt_linear",
]
