"""State space duality: the state space model of Mamba-2 as linear attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.linear._recurrence import Float64, recurrence


def state_space_duality(
    x: Any,
    dt: Any,
    a: Any,
    b: Any,
    c: Any,
    *,
    skip: Any = None,
    **options: Any,
) -> tuple[Float64, Float64]:
    """Row after row in float64; see `longattn.linear`. `options` are states and bounds of sequences."""
    return recurrence(
        c,
        b,
        x,
        g=np.asarray(dt, np.float64) * np.asarray(a, np.float64)[:, None],
        beta=dt,
        scale=1.0,
        skip=skip,
        **options,
    )
