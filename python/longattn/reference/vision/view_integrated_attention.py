"""`view_integrated_attention` from its formula, with the mask of all pairs."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, flat, linear, places, wide


def view_integrated_attention(x: ArrayLike, weights: Any, *, heads: int, kind: str = "view") -> Float64:
    """See `longattn.vision.view_integrated_attention`."""
    a = wide(x)
    at = places(a.shape[1:4])
    apart = {"view": [1], "frame": [0], "spatial": [0, 1], "temporal": [0, 2]}[kind]
    mask = (at[:, None, apart] == at[None][:, :, apart]).all(axis=-1)
    q, k, v = (flat(linear(a, w)) for w in weights[:3])
    return linear(attend(q, k, v, heads, mask=mask), weights[3]).reshape(a.shape)
