"""`focal_modulation` from its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longattn.reference.vision.layers import Float64, depthwise, gelu, layer_norm, linear, wide


def focal_modulation(
    x: ArrayLike,
    wf: Any,
    kernels: Sequence[Any],
    wh: Any,
    wo: Any,
    *,
    shift: Any = None,
    normalize_modulator: bool = False,
    norm: Any = None,
    causal: bool = False,
) -> Float64:
    """See `longattn.vision.focal_modulation`."""
    a = wide(x)
    c = a.shape[-1]
    every = linear(a, wf)
    q, z, gates = every[..., :c], every[..., c : 2 * c], every[..., 2 * c :]
    context = np.zeros(a.shape)
    for level, kernel in enumerate(kernels):
        if causal:
            k = len(kernel)
            z = gelu(depthwise(np.pad(z, ((0, 0), (k - 1, 0), (0, 0))), kernel, 1, 0))
        else:
            z = gelu(depthwise(z, kernel))
        context = context + gates[..., level, None] * z
    if causal:
        means = np.stack([z[:, : i + 1].mean(axis=1) for i in range(z.shape[1])], axis=1)
    else:
        means = z.mean(axis=tuple(range(1, z.ndim - 1)), keepdims=True)
    context = context + gates[..., -1:] * gelu(means)
    if normalize_modulator:
        context = context / (len(kernels) + 1)
    out = q * linear(context, wh)
    if shift is not None:
        out = out + linear(context, shift)
    return linear(out if norm is None else layer_norm(out, *norm), wo)
