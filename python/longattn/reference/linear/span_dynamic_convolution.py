"""ConvBERT's convolution from its formula, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention
from longattn.reference.linear.convolution import depthwise as convolve
from longattn.reference.linear.convolution import dynamic_conv

Float64 = NDArray[np.float64]


def span_dynamic_convolution(
    x: ArrayLike,
    wq: ArrayLike,
    depthwise: ArrayLike,
    pointwise: ArrayLike,
    wv: ArrayLike,
    wf: ArrayLike,
    *,
    heads: int,
    span_bias: ArrayLike | None = None,
    tap_bias: ArrayLike | None = None,
    attention_weights: Any = None,
    mask: ArrayLike | None = None,
    causal: bool = False,
) -> Float64:
    """Output `[B, L, heads * D]`; see `longattn.linear.span_dynamic_convolution`."""
    x, wq, depthwise, pointwise, wv, wf = (np.asarray(w, np.float64) for w in (x, wq, depthwise, pointwise, wv, wf))
    taps = depthwise.shape[1]

    def split(y: Float64) -> Float64:
        return y.reshape(*y.shape[:2], heads, y.shape[2] // heads).swapaxes(1, 2)

    def join(y: Float64) -> Float64:
        return y.swapaxes(1, 2).reshape(*x.shape[:2], y.shape[1] * y.shape[3])

    q, v = x @ wq, x @ wv
    k = convolve(x, depthwise, (taps - 1 if causal else (taps - 1) // 2,)) @ pointwise
    k = k if span_bias is None else k + np.asarray(span_bias, np.float64)
    logits = (q * k) @ wf
    logits = logits if tap_bias is None else logits + np.asarray(tap_bias, np.float64)
    seen = np.ones(x.shape[:2], bool) if mask is None else np.asarray(mask)
    y = join(dynamic_conv(split(v * seen[..., None]), split(logits), softmax=True, causal=causal))
    if attention_weights is None:
        return y
    keys, values = (split(x @ np.asarray(w, np.float64)) for w in attention_weights)
    attended: Any = attention(split(q), keys, values, causal=causal, mask=seen[:, None, None])
    return np.concatenate([join(attended[0] if isinstance(attended, tuple) else attended), y], axis=2)
