"""RWKV-7: the generalised delta rule, which removes by one vector and adds by another."""

from __future__ import annotations

from typing import Any

from longattn.reference.linear._recurrence import Float64, recurrence


def rwkv7(
    q: Any, k: Any, v: Any, g: Any, a: Any, b: Any, *, scale: float = 1.0, **options: Any
) -> tuple[Float64, Float64]:
    """Row after row in float64; see `longattn.linear`. `options` are states and bounds of sequences."""
    return recurrence(q, k, v, g=g, pair=(a, b), scale=scale, **options)
