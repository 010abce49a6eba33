"""`channel_group_attention` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, linear, softmax


def channel_group_attention(
    x: ArrayLike,
    wq: Any,
    wk: Any,
    wv: Any,
    *,
    groups: int,
    wo: Any = None,
    scale: float | None = None,
    roles: str = "paper",
) -> Float64:
    """See `longattn.vision.channel_group_attention`."""
    q, k, v = (linear(x, w) for w in (wq, wk, wv))
    if roles == "release":
        q, k, v = k, v, q
    batch, tokens, channels = q.shape
    d = channels // groups
    a, b, c = (m.reshape(batch, tokens, groups, d) for m in (q, k, v))
    s = softmax((d**-0.5 if scale is None else scale) * np.einsum("bnga,bngc->bgac", a, b))
    return linear(np.einsum("bgac,bngc->bnga", s, c).reshape(batch, tokens, channels), wo)
