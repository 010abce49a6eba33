"""`embedding_free_attention` from its formula."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, attend, flat, linear, wide


def embedding_free_attention(
    x: ArrayLike, ws: Any = None, *, heads: int, reduction: int = 1, wo: Any = None
) -> Float64:
    """See `longattn.vision.embedding_free_attention`."""
    a = wide(x)
    b, h, w, c = a.shape
    r = reduction
    cells = a[:, : h // r * r, : w // r * r].reshape(b, h // r, r, w // r, r, c).mean(axis=(2, 4))
    keys = linear(flat(cells), ws)
    return linear(attend(flat(a), keys, keys, heads).reshape(a.shape), wo)
