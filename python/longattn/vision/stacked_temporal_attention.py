"""Attention over the frames of each place, with rotary positions in time, added to what a spatial layer gives."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn._arrays import Array, reshaped
from longattn._checks import flag, real
from longattn._rotary import turned
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._blocks import Block
from longattn.vision._inputs import Float32, features, head_count, layer_norm, norm_weights, returned
from longattn.vision.partition import attend


def stacked_temporal_attention(
    x: Array,
    weights: Any,
    *,
    heads: int,
    norm: tuple[Array, Array] | None = None,
    base: float | None = 10000.0,
    causal: bool = False,
) -> Array:
    """`x` plus attention over time: the sequence is the frames, every place by itself.

    It stands after the spatial attention of each block of an image encoder; with an output projection of zeros the
    encoder is unchanged, which is where training starts. That it looks both ways by default is how the paper is read.

    Args:
        x: tokens `[B, F, N, C]`; float32, float16 or bfloat16.
        weights: `(wq, wk, wv, wo)`, `[C, C]` each, pairs `(matrix, bias)`, or `None`.
        heads: heads; of an even width where there are rotary positions.
        norm: `(weight, bias)` of a layer norm before it; `None` is none.
        base: base of the rotary positions, which are the frames' numbers; `None` is none.
        causal: a frame sees those before it and itself only.

    Returns:
        The tokens, in the shape, kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * N * F ** 2 * C` multiply-adds, and the projections; a copy by places.

    References:
        "Enhancing Temporal Understanding in Video-LLMs through Stacked Temporal Attention in Vision Encoders", 2025.

    Example:
        >>> import numpy as np, longattn.vision
        >>> x = np.random.default_rng(0).standard_normal((1, 4, 9, 16), dtype=np.float32)
        >>> longattn.vision.stacked_temporal_attention(x, (None,) * 4, heads=2).shape
        (1, 4, 9, 16)
    """
    xn = features(x, "x", 4, "[B, F, N, C]")
    batch, frames, places, channels = xn.shape
    if not frames:
        raise ValueError(f"x: got no frames in shape {xn.shape}, expected at least 1")
    number = head_count(heads, {"x": channels})
    block = Block.of(weights, "weights", channels, number)
    normed = None if norm is None else norm_weights(norm, "norm", channels)
    period = None if base is None else real(base, "base")
    if period is not None and (not 1 < period < np.inf or channels // number % 2):
        raise ValueError(f"base: got {base} for heads of {channels // number}, expected above 1 and even heads")
    backwards = flag(causal, "causal")
    rows = np.ascontiguousarray(xn.swapaxes(1, 2)).reshape(-1, frames, channels)
    seen = rows if normed is None else layer_norm(rows, *normed)
    q, k = (_turned(a, number, period) for a in (block.q(seen), block.k(seen)))
    out = block.o(attend(q, k, block.v(seen), heads=number, causal=backwards))
    return returned(x, xn + out.reshape(batch, places, frames, channels).swapaxes(1, 2))


def _turned(x: Float32, heads: int, base: float | None) -> Float32:
    """Rows `[B, F, C]` with rotary positions."""
    if base is None:
        return x
    split = reshaped(x, *x.shape[:2], heads, -1).swapaxes(1, 2)
    return np.ascontiguousarray(turned(split, np.arange(x.shape[1]), base).swapaxes(1, 2)).reshape(x.shape)


METHOD = Method(
    name="stacked_temporal_attention",
    family="vision",
    title="Enhancing Temporal Understanding in Video-LLMs through Stacked Temporal Attention in Vision Encoders",
    year=2025,
    arxiv="2510.26027",
    function=stacked_temporal_attention,
    reference=reference.stacked_temporal_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "One frame adds the projected value.",
        "An output projection of zeros changes nothing.",
        "Permuted places give permuted outputs.",
    ),
    tests="tests/vision/test_stacked_temporal_attention.py",
    cost="`2 * N * F ** 2 * C` multiply-adds, and the projections.",
    mask=lambda: layer_seen(
        lambda x, wq, wk, wv: stacked_temporal_attention(x, (wq, wk, wv, None), heads=1, causal=True), (6, 12)
    ),
)
