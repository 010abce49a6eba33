"""Linear attention: sums of keys and values instead of a softmax."""

from __future__ import annotations

from typing import Any

from longattn.reference.linear._recurrence import Float64, recurrence


def linear_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    feature_map: Any = None,
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    **options: Any,
) -> tuple[Float64, Float64]:
    """Row after row in float64; see `longattn.linear`. `options` are states and bounds of sequences."""
    return recurrence(
        q,
        k,
        v,
        scale=scale,
        maps=(feature_map, feature_map),
        normaliser=eps if normalize else None,
        **options,
    )
