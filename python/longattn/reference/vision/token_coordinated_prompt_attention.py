"""`token_coordinated_prompt_attention` from its formula: all keys with a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, softmax, wide


def token_coordinated_prompt_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cls_prompts: Any,
    image_prompts: Any,
    cls_chosen: ArrayLike,
    image_chosen: ArrayLike,
    *,
    mode: str = "post",
    open_pools: bool = False,
    scale: float | None = None,
) -> Float64:
    """See `longattn.vision.token_coordinated_prompt_attention`."""
    q, k, v = wide(q), wide(k), wide(v)
    batch, heads, tokens, dim = q.shape
    (mc, lc), (mi, li) = (np.shape(pair[0])[1:3] for pair in (cls_prompts, image_prompts))
    seen = np.zeros((batch, tokens, tokens + mc * lc + mi * li), bool)
    seen[:, :, :tokens] = True
    for b in range(batch):
        for m in np.asarray(cls_chosen)[b]:
            seen[b, 0, tokens + m * lc : tokens + (m + 1) * lc] = True
        for t in range(1, tokens):
            for m in np.asarray(image_chosen)[b, t - 1]:
                at = tokens + mc * lc + m * li
                seen[b, t, at : at + li] = True
    if open_pools:
        seen[:] = True
    parts = []
    for n, own in enumerate((k, v)):
        more = [wide(pair[n]).reshape(own.shape[1], -1, own.shape[3]) for pair in (cls_prompts, image_prompts)]
        full = np.concatenate([own, *(np.repeat(x[None], batch, axis=0) for x in more)], axis=2)
        parts.append(np.repeat(full, heads // own.shape[1], axis=1))
    s = (dim**-0.5 if scale is None else scale) * (q @ parts[0].swapaxes(-1, -2))
    mask = seen[:, None]
    p = softmax(np.where(mask, s, -np.inf)) if mode == "pre" else softmax(s) * mask
    out: Float64 = p @ parts[1]
    return out
