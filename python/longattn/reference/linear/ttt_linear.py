"""TTT-Linear, token by token."""

from __future__ import annotations

from typing import Any

from longattn.reference.linear._fast_weight import Float64, fast_weight


def ttt_linear(
    q: Any,
    k: Any,
    v: Any,
    eta: Any,
    gain: Any,
    shift: Any,
    *,
    weights: Any = None,
    eps: float = 1e-6,
    scale: float = 1.0,
    chunk_size: int = 16,
) -> tuple[Float64, list[Float64]]:
    """See `longattn.linear`; returns the matrix after the last row in place of a state."""
    return fast_weight(
        q,
        k,
        v,
        eta,
        None if weights is None else [weights],
        descend=lambda e, _: e,
        bias=True,
        residual=(gain, shift, eps),
        scale=scale,
        chunk_size=chunk_size,
    )
