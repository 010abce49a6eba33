"""The neural memory of Titans, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.linear._fast_weight import Float64, fast_weight


def titans_neural_memory(
    q: Any,
    k: Any,
    v: Any,
    theta: Any,
    *,
    weights: Any = None,
    alpha: Any = None,
    eta: Any = None,
    activation: str = "silu",
    loss_scale: float = 0.5,
    read: str = "after",
    update: str = "per_token",
    normalize_qk: bool = True,
    scale: float = 1.0,
    chunk_size: int = 16,
) -> tuple[Float64, list[Float64]]:
    """See `longattn.linear`; returns the matrices after the last row in place of a state."""
    return fast_weight(
        q,
        k,
        v,
        theta,
        weights,
        descend=lambda e, _: 2 * loss_scale * e,
        keep=1.0 if alpha is None else 1 - np.asarray(alpha, np.float64),
        momentum=0.0 if eta is None else eta,
        activation=activation,
        before=read == "before" and update == "per_token",
        update=update,
        unit=1e-6 if normalize_qk else None,
        scale=scale,
        chunk_size=chunk_size,
    )
