"""Lightning attention: linear attention with a fixed decay per head."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.linear._recurrence import Float64, recurrence


def lightning_attention(
    q: Any,
    k: Any,
    v: Any,
    slopes: Any,
    *,
    scale: float = 1.0,
    **options: Any,
) -> tuple[Float64, Float64]:
    """Row after row in float64; see `longattn.linear`. `options` are states and bounds of sequences."""
    return recurrence(
        q,
        k,
        v,
        g=-np.asarray(slopes, np.float64),
        scale=scale,
        **options,
    )
