"""The local step of L2ViT: two convolutions of the tokens as a map, between its blocks of linear attention."""

from __future__ import annotations

import numpy as np

from longattn._arrays import Array, like
from longattn.linear._channels import pointwise, storage_rows
from longattn.linear.convolution import depthwise_conv2d
from longattn.linear.simplified_linear_attention import fold_rep_batch_norm


def local_concentration(
    x: Array,
    first: tuple[Array, Array | None],
    norm: tuple[Array, Array, Array, Array],
    second: tuple[Array, Array | None],
    *,
    eps: float = 1e-5,
) -> Array:
    """`x + conv(norm(gelu(conv(x))))`, depthwise: gathers near by what linear attention spreads over the map.

    Args:
        x: map `[B, H, W, C]`; float32, float16 or bfloat16.
        first: taps `[C, kh, kw]` and bias `[C]` (or `None`) of the first convolution, floating; the paper's are 7 x 7.
        norm: `(mean, var, gamma, beta)` of the batch normalisation, floating `[C]` each.
        second: taps and bias of the second convolution.
        eps: added to variances.

    Returns:
        `[B, H, W, C]` in the kind and dtype of `x`. Arithmetic is float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a negative variance.

    Cost:
        `2 * B * H * W * C * kh * kw` multiply-adds.

    References:
        C. Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025, arXiv:2501.16182.

    Example:
        >>> import numpy as np, longattn as la
        >>> x = np.ones((1, 5, 5, 2), np.float32)
        >>> conv, norm = (np.zeros((2, 7, 7)), np.ones(2)), (np.zeros(2), np.ones(2), np.ones(2), np.zeros(2))
        >>> la.linear.local_concentration(x, conv, norm, conv)[0, 0, 0].tolist()
        [2.0, 2.0]
    """
    xn = storage_rows(x, "x", (None, None, None, None), "[B, H, W, C]")
    for pair, name, count, parts in (
        (first, "first", 2, "(taps, bias)"),
        (second, "second", 2, "(taps, bias)"),
        (norm, "norm", 4, "(mean, var, gamma, beta)"),
    ):
        if not isinstance(pair, tuple | list) or len(pair) != count:
            raise TypeError(f"{name}: got {type(pair).__name__}, expected {parts}")
    mean, var, gamma, beta = norm
    factor, shift = fold_rep_batch_norm(mean, var, gamma, beta, alpha=0.0, eps=eps)
    if factor.shape != xn.shape[3:]:
        raise ValueError(f"norm: got {factor.shape[0]} channels, expected the {xn.shape[3]} of x")
    # The last argument is checked before any work, by a map of no places.
    depthwise_conv2d(np.zeros((0, 1, 1, xn.shape[3]), np.float32), *second)
    wide = np.ascontiguousarray(xn, np.float32)
    inner = pointwise("gelu", depthwise_conv2d(wide, *first)) * factor + shift
    return like(x, (wide + depthwise_conv2d(inner, *second)).astype(xn.dtype, copy=False))
