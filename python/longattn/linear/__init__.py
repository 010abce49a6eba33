"""Linear attention: states of fixed size in place of a cache that grows."""

from longattn.linear.lasp2_linear_attention import (
    LaspStats,
    lasp2_hybrid_attention,
    lasp2_linear_attention,
    lasp2_linear_attention_backward,
)

__all__ = ["LaspStats", "lasp2_hybrid_attention", "lasp2_linear_attention", "lasp2_linear_attention_backward"]
