"""The gated delta rule: a decay per row, then the delta rule."""

from __future__ import annotations

from typing import Any

from longattn.reference.linear._recurrence import Float64, recurrence


def gated_delta_rule(
    q: Any, k: Any, v: Any, g: Any, beta: Any, *, scale: Any = None, normalize_qk: bool = False, **options: Any
) -> tuple[Float64, Float64]:
    """Row after row in float64; see `longattn.linear`. `options` are states and bounds of sequences."""
    unit = 1e-6 if normalize_qk else None
    return recurrence(q, k, v, g=g, beta=beta, delta=True, scale=scale, unit=unit, **options)
