"""RWKV-6: a decay per channel of the keys, and a weight of its own for the current token."""

from __future__ import annotations

from typing import Any

from longattn.reference.linear._recurrence import Float64, recurrence


def rwkv6(q: Any, k: Any, v: Any, g: Any, u: Any, *, scale: float = 1.0, **options: Any) -> tuple[Float64, Float64]:
    """Row after row in float64; see `longattn.linear`. `options` are states and bounds of sequences."""
    return recurrence(q, k, v, g=g, bonus=u, scale=scale, **options)
