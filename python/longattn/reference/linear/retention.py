"""Retention: linear attention whose heads forget at fixed rates."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.linear._recurrence import Float64, recurrence


def retention(
    q: Any,
    k: Any,
    v: Any,
    gamma: Any = None,
    *,
    scale: Any = None,
    **options: Any,
) -> tuple[Float64, Float64]:
    """Row after row in float64; see `longattn.linear`. `options` are states and bounds of sequences."""
    if gamma is None:
        gamma = 1 - 2.0 ** (-5.0 - np.arange(np.shape(v)[-3]))
    return recurrence(
        q,
        k,
        v,
        g=np.log(np.asarray(gamma, np.float64)),
        scale=scale,
        **options,
    )
