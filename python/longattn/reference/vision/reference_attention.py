"""`reference_attention` from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.vision.layers import Float64, linear, softmax, wide


def reference_attention(
    text: Any,
    image: Any,
    condition: Any,
    *,
    w_zero: Any = None,
    joint: bool = False,
    text_to_condition: bool = True,
    scale: float | None = None,
) -> tuple[Float64, Float64, Float64]:
    """See `longattn.vision.reference_attention`."""
    groups = []
    for group in (text, image, condition):
        q, k, v = (wide(x) for x in group)
        k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
        groups.append((q, k, v))
    f = groups[0][0].shape[-1] ** -0.5 if scale is None else scale

    def read(q: Float64, *sources: int) -> Float64:
        k, v = (np.concatenate([groups[s][n] for s in sources], axis=2) for n in (1, 2))
        return np.asarray(softmax(f * (q @ k.swapaxes(-1, -2))) @ v)

    of_text, of_condition = read(groups[0][0], 0, 1), read(groups[2][0], *((0, 2) if text_to_condition else (2,)))
    qi = groups[1][0]
    if joint:
        return of_text, read(qi, 0, 1, 2), of_condition
    extra = np.swapaxes(read(qi, 2), 1, 2)
    mixed = linear(extra.reshape(*extra.shape[:2], -1), w_zero).reshape(extra.shape)
    return of_text, read(qi, 0, 1) + np.swapaxes(mixed, 1, 2), of_condition
