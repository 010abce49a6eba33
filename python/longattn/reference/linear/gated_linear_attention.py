"""Gated linear attention: each channel of the keys decays by itself."""

from __future__ import annotations

from typing import Any

from longattn.reference.linear._recurrence import Float64, recurrence


def gated_linear_attention(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    *,
    scale: Any = None,
    **options: Any,
) -> tuple[Float64, Float64]:
    """Row after row in float64; see `longattn.linear`. `options` are states and bounds of sequences."""
    return recurrence(
        q,
        k,
        v,
        g=g,
        scale=scale,
        **options,
    )
