"""HGRN2: a gated linear recurrence whose keys are what its gates forget."""

from __future__ import annotations

from typing import Any

from longattn.reference.linear._recurrence import Float64, recurrence


def hgrn2(
    q: Any,
    v: Any,
    g: Any,
    *,
    scale: float = 1.0,
    **options: Any,
) -> tuple[Float64, Float64]:
    """Row after row in float64; see `longattn.linear`. `options` are states and bounds of sequences."""
    return recurrence(
        q,
        None,
        v,
        g=g,
        scale=scale,
        **options,
    )
