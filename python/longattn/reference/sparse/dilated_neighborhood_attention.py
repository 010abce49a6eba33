"""Dilated neighbourhood attention: float64 numpy."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from longattn.reference.sparse.generalized_neighborhood_attention import generalized_neighborhood_attention


def dilated_neighborhood_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    window: Any = 7,
    dilation: Any = 1,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """See `longattn.sparse.dilated_neighborhood_attention`."""
    return generalized_neighborhood_attention(
        q, k, v, window=window, dilation=dilation, bias=bias, scale=scale, return_lse=return_lse
    )
