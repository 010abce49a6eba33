"""Linear attention: states of fixed size in place of a cache that grows."""

from longattn.linear.adaptive_frequency_filter import adaptive_frequency_filter
from longattn.linear.bidirectional_gated_ssm import DiagonalSsm, bidirectional_gated_ssm
from longattn.linear.bidirectional_mamba import bidirectional_mamba
from longattn.linear.convolution import causal_conv1d, depthwise_conv1d, depthwise_conv2d, dynamic_conv
from longattn.linear.diagonal_scan import diagonal_scan
from longattn.linear.gated_associative_memory import gated_associative_memory
from longattn.linear.hyena_pixel_conv import hyena_pixel_conv, hyena_pixel_kernel
from longattn.linear.kernelized_rpe_attention import kernelized_rpe_attention
from longattn.linear.lasp2_linear_attention import (
    LaspStats,
    lasp2_hybrid_attention,
    lasp2_linear_attention,
    lasp2_linear_attention_backward,
)
from longattn.linear.mamba_mixer import MambaState, MambaWeights, mamba_mixer
from longattn.linear.mega_gated_attention import MegaWeights, mega_gated_attention
from longattn.linear.multi_dim_damped_ema import multi_dim_damped_ema
from longattn.linear.reverse_attention_gate import reverse_attention_gate, tri_plane_scan
from longattn.linear.selective_scan import selective_scan
from longattn.linear.selective_token_channel_mixer import selective_token_channel_mixer
from longattn.linear.shared_time_frequency_attention import shared_time_frequency_attention
from longattn.linear.span_dynamic_convolution import span_dynamic_convolution
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
    "depthwise_conv1d",
    "depthwise_conv2d",
    "diagonal_scan",
    "dynamic_conv",
    "gated_associative_memory",
    "hyena_pixel_conv",
    "hyena_pixel_kernel",
    "kernelized_rpe_attention",
    "lasp2_hybrid_attention",
    "lasp2_linear_attention",
    "lasp2_linear_attention_backward",
    "mamba_mixer",
    "mega_gated_attention",
    "multi_dim_damped_ema",
    "reverse_attention_gate",
    "selective_scan",
    "selective_token_channel_mixer",
    "shared_time_frequency_attention",
    "span_dynamic_convolution",
    "toeplitz",
    "toeplitz2d",
    "tri_plane_scan",
]
