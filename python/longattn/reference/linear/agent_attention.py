"""Agent attention from the matrices of both of its softmaxes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.linear.features import Float64, convolved, pairs, softmax


def pooled(q: Float64, bins: tuple[int, int], size: tuple[int, int], first: int) -> Float64:
    """Means over adaptive bins of the map."""
    rows = q[..., first:, :].reshape(*q.shape[:-2], *size, q.shape[-1])
    cells = []
    for y in range(bins[0]):
        for x in range(bins[1]):
            top, bottom = y * size[0] // bins[0], -(-(y + 1) * size[0] // bins[0])
            left, right = x * size[1] // bins[1], -(-(x + 1) * size[1] // bins[1])
            cells.append(rows[..., top:bottom, left:right, :].mean(axis=(-3, -2)))
    return np.stack(cells, axis=-2)


def agent_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    agents: Any = (7, 7),
    size: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    scale: float | None = None,
    query_scale: float | None = None,
    agent_bias: ArrayLike | None = None,
    query_bias: ArrayLike | None = None,
    shortcut: float = 0.0,
    dwc_weight: ArrayLike | None = None,
    dwc_bias: ArrayLike | None = None,
) -> Float64:
    """See `longattn.linear`."""
    qn, kn, vn = pairs(q, k, v)
    s = qn.shape[-1] ** -0.5 if scale is None else scale
    s2 = s if query_scale is None else query_scale
    if isinstance(agents, tuple):
        assert size is not None
        a = pooled(qn, agents, size, prefix_tokens)
    elif isinstance(agents, int):
        a = pooled(qn, (1, agents), (1, qn.shape[-2] - prefix_tokens), prefix_tokens)
    else:
        a = np.asarray(agents, np.float64)
    gather = s * (a @ kn.swapaxes(-1, -2)) + (0 if agent_bias is None else np.asarray(agent_bias, np.float64))
    read = s2 * (qn @ a.swapaxes(-1, -2)) + (0 if query_bias is None else np.asarray(query_bias, np.float64))
    out = softmax(read) @ (softmax(gather) @ vn) + (shortcut * vn if shortcut else 0)
    found: Float64 = out + (0 if dwc_weight is None else convolved(vn, dwc_weight, dwc_bias, size, prefix_tokens))
    return found
