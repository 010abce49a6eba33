"""Attention of each place to features of earlier layers, sampled where the place says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, grid, numbers, odd_kernel, returned, same_shape
from longattn.vision.convolution import depthwise_convolution
from longattn.vision.deformable_kv_attention_3d import place_numbers
from longattn.vision.sample import sample


def adaptive_cross_layer_attention(
    x: Array,
    layers: Sequence[Array],
    w_ref: Weights,
    offsets: Weights,
    weights: Weights,
    kernel: Array,
    *,
    shift: Array | None = None,
    kept: Array | None = None,
) -> Array:
    """`x` plus a convolution of what each place reads at a few real offsets in the features of earlier layers.

    For each layer `K` offsets and `K` logits are projections of the place's features in `x`. The layer's features,
    projected by `w_ref`, are sampled at the place plus offset; one softmax over the points of all layers weighs them.
    Points that a selection leaves out do not take part (in the published code they do, with a logit of 0).

    Args:
        x: features of the current layer, grid `[B, H, W, C]`; float32, float16 or bfloat16.
        layers: features of earlier layers, of the same shape.
        w_ref: weights `[C, C]`, or a pair `(matrix, bias)`.
        offsets: weights `[C, layers * K * 2]`, or a pair: (y, x) of each point, in places.
        weights: weights of the logits `[C, layers * K]`, or a pair.
        kernel: floating `[k, k, C]`: the depth-wise convolution of the sums, its batch norm folded.
        shift: floating `[C]`, added after it.
        kept: booleans `[B, H, W, layers * K]`: the points that take part; `None` is all. A place without any gets 0.

    Returns:
        `[B, H, W, C]`, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `4 * H * W * layers * K * C` multiply-adds, and the projections.

    References:
        Y. Wang et al., "Adaptive Cross-Layer Attention for Image Restoration", 2022, arXiv:2203.03619.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x, one = rng.standard_normal((2, 1, 6, 6, 8), dtype=np.float32)
        >>> w = np.eye(8), rng.standard_normal((8, 6)), rng.standard_normal((8, 3)), np.ones((3, 3, 8))
        >>> longattn.vision.adaptive_cross_layer_attention(x, [one], *w).shape
        (1, 6, 6, 8)
    """
    xn = grid(x, "x")
    channels = xn.shape[-1]
    if not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"layers: got {type(layers).__name__}, expected at least one grid in a sequence")
    sources = [same_shape(f, f"layers[{n}]", xn, "x") for n, f in enumerate(layers)]
    ref, logits_of = Linear.of(w_ref, "w_ref", channels, channels), Linear.of(weights, "weights", channels)
    if logits_of.outputs % len(sources):
        raise ValueError(f"weights: got {logits_of.outputs} outputs, expected a multiple of {len(sources)} layers")
    points = logits_of.outputs // len(sources)
    by = Linear.of(offsets, "offsets", channels, 2 * logits_of.outputs)
    taps = odd_kernel(kernel, "kernel", (None, None, channels))
    added = None if shift is None else numbers(shift, "shift", (channels,))
    shares = _shares(logits_of(xn), kept)
    at = by(xn).reshape(*xn.shape[:3], len(sources), points, 2) + place_numbers(xn.shape[1:3])[:, :, None, None]
    total = np.zeros_like(xn)
    for n, source in enumerate(sources):
        own = shares[..., n * points : (n + 1) * points]
        total += sample(ref(source), at[:, :, :, n], weights=own, coordinates="pixel")
    return returned(x, xn + depthwise_convolution(total, taps, bias=added))


def _shares(logits: Float32, kept: Array | None) -> Float32:
    """Softmax over the points that take part."""
    if kept is not None:
        mask = as_numpy(kept, "kept")
        if mask.dtype != np.bool_:
            raise TypeError(f"kept: got dtype {mask.dtype}, expected bool")
        if mask.shape != logits.shape:
            raise ValueError(f"kept: got shape {mask.shape}, expected {logits.shape}")
        logits = np.where(mask, logits, np.float32(-np.inf)).astype(np.float32, copy=False)
    top = logits.max(axis=-1, keepdims=True)
    top[np.isneginf(top)] = 0
    e = np.exp(logits - top)
    mass = e.sum(axis=-1, keepdims=True)
    mass[mass == 0] = 1
    shares: Float32 = e / mass
    return shares


def _example() -> NDArray[np.bool_]:
    """What places read of two layers, at three points each."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 8, 8, 128), dtype=np.float32)
    layers = np.split(np.eye(128, dtype=np.float32).reshape(2, 8, 8, 128), 2)
    offsets, weights = (0.1 * rng.standard_normal((128, n)) for n in (12, 6))
    out = adaptive_cross_layer_attention(x, layers, np.eye(128), offsets, weights, np.ones((1, 1, 128)))
    mask: NDArray[np.bool_] = (np.asarray(out) != x).reshape(64, 128)
    return mask


METHOD = Method(
    name="adaptive_cross_layer_attention",
    family="vision",
    title="Adaptive Cross-Layer Attention for Image Restoration",
    year=2022,
    arxiv="2203.03619",
    function=adaptive_cross_layer_attention,
    reference=reference.adaptive_cross_layer_attention,
    exact=True,
    modes=frozenset({"non-causal", "cross"}),
    gqa=False,
    step=False,
    checks=(
        "One point without offset reads its own place.",
        "Where all offsets are equal the logits do not matter.",
        "A selection of all points changes nothing.",
    ),
    tests="tests/vision/test_adaptive_cross_layer_attention.py",
    cost="`4 * H * W * layers * K * C` multiply-adds, and the projections.",
    mask=_example,
    axes=("places", "places of two layers"),
)
