"""Attention between the features of layers, and gates of one layer's features by a convolution over all of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn._arrays import Array, reshaped
from longattn._checks import finite, integer
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, features, odd_kernel, returned
from longattn.vision.convolution import depthwise_convolution


def layer_and_channel_spatial_attention(x: Array, *, gamma: float = 1.0, sign: int = -1) -> Array:
    """Layer attention: `F_i + gamma * sum_j softmax_j(sign * F_i . F_j) F_j` over the features of all layers.

    The features of a layer are one long vector. With `sign=-1`, as in the published code, layers weigh most that are
    least alike. The other half of the paper, a gate, is `channel_spatial_gate`.

    Args:
        x: features of `n` layers `[B, n, ...]`, joined into vectors; float32, float16 or bfloat16.
        gamma: factor on the sum; learned from 0 on.
        sign: -1, or 1 for layers that are most alike.

    Returns:
        The features, in the shape, kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * n ** 2 * numbers of a layer` multiply-adds. Logits are sums over whole layers, in float32.

    References:
        B. Niu et al., "Single Image Super-Resolution via a Holistic Attention Network", 2020, arXiv:2008.08767.

    Example:
        >>> import numpy as np, longattn.vision
        >>> x = np.random.default_rng(0).standard_normal((1, 3, 4, 5, 6), dtype=np.float32)
        >>> longattn.vision.layer_and_channel_spatial_attention(x, gamma=0.1).shape
        (1, 3, 4, 5, 6)
    """
    rank = len(np.shape(x))
    if rank < 3:
        raise ValueError(f"x: got shape {tuple(np.shape(x))}, expected [B, n, ...]")
    xn = features(x, "x", rank, "[B, n, ...]")
    way, weight = integer(sign, "sign", -1, 1), finite(gamma, "gamma")
    if way == 0:
        raise ValueError("sign: got 0, expected -1 or 1")
    if xn.size == 0:
        return returned(x, xn)
    rows = reshaped(xn, len(xn), 1, xn.shape[1], -1)
    out = attention(rows, rows, rows, scale=float(way)).reshape(xn.shape)
    return returned(x, xn + np.float32(weight) * out)


def channel_spatial_gate(x: Array, kernel: Array, *, bias: float = 0.0, gamma: float = 1.0) -> Array:
    """`x + gamma * sigmoid(convolution(x)) * x`, the features taken as one volume of channels and places.

    Args:
        x: features `[B, H, W, C]`; float32, float16 or bfloat16.
        kernel: floating `[k, k, k]`, over H, W and channels, odd `k`; zeros outside.
        bias: added to the convolution.
        gamma: factor on the gated features; learned from 0 on.

    Returns:
        The features, in the shape, kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `k ** 3` multiply-adds per number.
    """
    xn = features(x, "x", 4, "[B, H, W, C]")
    if 0 in xn.shape[1:]:
        raise ValueError(f"x: got an empty axis in shape {xn.shape}, expected none")
    taps = odd_kernel(kernel, "kernel", (None, None, None))
    added, weight = finite(bias, "bias"), np.float32(finite(gamma, "gamma"))
    volume: Any = depthwise_convolution(xn[..., None], taps[..., None])[..., 0]
    gate: Float32 = 1 / (1 + np.exp(-(volume + np.float32(added))))
    return returned(x, xn + weight * gate * xn)


METHOD = Method(
    name="layer_and_channel_spatial_attention",
    family="vision",
    title="Single Image Super-Resolution via a Holistic Attention Network",
    year=2020,
    arxiv="2008.08767",
    function=layer_and_channel_spatial_attention,
    reference=reference.layer_and_channel_spatial_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "With `gamma = 0` it returns its input.",
        "One layer is multiplied by `1 + gamma`.",
        "Layers that are all equal get their mean.",
    ),
    tests="tests/vision/test_layer_and_channel_spatial_attention.py",
    cost="`2 * n ** 2 * numbers of a layer` multiply-adds.",
)
