"""Linear attention: states of fixed size in place of a cache that grows."""

from longattn.linear.adaptive_frequency_filter import adaptive_frequency_filter
from longattn.linear.bidirectional_gated_ssm import DiagonalSsm, bidirectional_gated_ssm
from longattn.linear.bidirectional_mamba import bidirectional_mamba
from longattn.linear.convolution import causal_conv1d, depthwise_conv1d, depthwise_conv2d, dynamic_conv
from longattn.linear.delta_rule_attention import delta_rule_attention
from longattn.linear.diagonal_scan import diagonal_scan
from longattn.linear.gated_associative_memory import gated_associative_memory
from longattn.linear.gated_delta_rule import gated_delta_rule
from longattn.linear.gated_linear_attention import gated_linear_attention
from longattn.linear.hgrn2 import hgrn2
from longattn.linear.hyena_pixel_conv import hyena_pixel_conv, hyena_pixel_kernel
from longattn.linear.kernelized_rpe_attention import kernelized_rpe_attention
from longattn.linear.kimi_delta_attention import kimi_delta_attention
from longattn.linear.lasp2_linear_attention import (
    LaspStats,
    lasp2_hybrid_attention,
    lasp2_linear_attention,
    lasp2_linear_attention_backward,
)
from longattn.linear.lightning_attention import lightning_attention, lightning_slopes
from longattn.linear.linear_attention import linear_attention
from longattn.linear.mamba_mixer import MambaState, MambaWeights, mamba_mixer
from longattn.linear.mega_gated_attention import MegaWeights, mega_gated_attention
from longattn.linear.multi_dim_damped_ema import multi_dim_damped_ema
from longattn.linear.retention import retention
from longattn.linear.reverse_attention_gate import reverse_attention_gate, tri_plane_scan
from longattn.linear.selective_scan import selective_scan
from longattn.linear.selective_token_channel_mixer import selective_token_channel_mixer
from longattn.linear.shared_time_frequency_attention import shared_time_frequency_attention
from longattn.linear.span_dynamic_convolution import span_dynamic_convolution
from longattn.linear.state_space_duality import state_space_duality
from longattn.linear.toeplitz import toeplitz, toeplitz2d

__all__ = [
    "DiagonalSsm",
    "LaspStats",
    "MambaState",
    "MambaWeights",
    "MegaWeights",
    "adaptive_frequency_filter",
    "bidirectional_gated_ssm",
    "bidirectional_mamba",
    "causal_conv1d",
    "delta_rule_attention",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "diagonal_scan",
    "dynamic_conv",
    "gated_associative_memory",
    "gated_delta_rule",
    "gated_linear_attention",
    "hgrn2",
    "hyena_pixel_conv",
    "hyena_pixel_kernel",
    "kernelized_rpe_attention",
    "kimi_delta_attention",
    "lasp2_hybrid_attention",
    "lasp2_linear_attention",
    "lasp2_linear_attention_backward",
    "lightning_attention",
    "lightning_slopes",
    "linear_attention",
    "mamba_mixer",
    "mega_gated_attention",
    "multi_dim_damped_ema",
    "retention",
    "reverse_attention_gate",
    "selective_scan",
    "selective_token_channel_mixer",
    "shared_time_frequency_attention",
    "span_dynamic_convolution",
    "state_space_duality",
    "toeplitz",
    "toeplitz2d",
    "tri_plane_scan",
]
