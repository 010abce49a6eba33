"""Cross-attention between images whose weights are made more distinct, and the match of colours beside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import batched, dense_inputs, finite, scale_factor
from longattn.dense._options import score_options
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, grid, returned


def cross_image_attention(q: Array, k: Array, v: Array, *, contrast: float = 1.67, scale: float | None = None) -> Array:
    """Queries of one image read keys and values of another by `clip(m + contrast * (w - m), 0, 1)`.

    `w` are the softmax weights of a row and `m = 1 / Lk` their mean: what is above it rises, what is below it falls,
    down to 0, and the result is not normalised again. In the paper queries are those of the output, keys and values
    those of the image whose appearance it takes (in some steps of the one that gives the structure), and predictions
    with and without this attention are `eps + 3.5 * (eps_cross - eps)`, which is the caller's; so is the choice of
    layers and steps. Latents are matched by `masked_adain`.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`; dtype of `k`.
        contrast: at least 0; 1 is attention.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        `[B, Hq, Lq, Dv]` in the kind and dtype of `q`; arithmetic is float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * Lq * Lk * (2 * D + Dv)` multiply-adds: logits are computed twice, and never stored.

    References:
        Y. Alaluf et al., "Cross-Image Attention for Zero-Shot Appearance Transfer", 2023, arXiv:2311.03335.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 16, 8), dtype=np.float32)
        >>> longattn.vision.cross_image_attention(q, k, v).shape
        (1, 2, 16, 8)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    factor, amount = scale_factor(scale, qn.shape[-1]), finite(contrast, "contrast")
    if amount < 0:
        raise ValueError(f"contrast: got {contrast}, expected at least 0")
    keys = kn.shape[-2]
    options = score_options(qn.shape, keys, span=qn.shape[-2] + keys, scale=factor)
    result = np.zeros((*qn.shape[:-1], vn.shape[-1]), qn.dtype)
    if result.size:
        q4, k4, v4, out4 = (batched(x, 4) for x in (qn, kn, vn, result))
        _core.weighted_attention(q4, k4, v4, out4, options, contrast=amount)
    return like(q, result)


def masked_adain(x: Array, style: Array, mask: Array, style_mask: Array, *, eps: float = 1e-5) -> Array:
    """Features whose mean and deviation inside a mask become those of others inside theirs, channel by channel.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16.
        style: grid `[B, H', W', C]`.
        mask: booleans `[B, H, W]`; what lies outside stays as it is.
        style_mask: booleans `[B, H', W']`. An image without a place in one of the masks stays as it is.
        eps: added to the variances.

    Returns:
        A grid of the shape, kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        A few passes over both grids.
    """
    a, b = grid(x, "x"), grid(style, "style")
    if b.shape[0] != a.shape[0] or b.shape[-1] != a.shape[-1]:
        raise ValueError(f"style: got shape {b.shape}, expected batch {a.shape[0]} and {a.shape[-1]} channels as x")
    inside, inside_style = _places(mask, "mask", a), _places(style_mask, "style_mask", b)
    small = finite(eps, "eps", 0)
    out = a.copy()
    for n, (own, other) in enumerate(zip(inside, inside_style, strict=True)):
        if own.any() and other.any():
            mean, deviation = _moments(a[n][own], small)
            to_mean, to_deviation = _moments(b[n][other], small)
            out[n][own] = (a[n][own] - mean) * (to_deviation / deviation) + to_mean
    return returned(x, out)


def _places(mask: Array, name: str, x: Float32) -> NDArray[np.bool_]:
    m = as_numpy(mask, name)
    if m.dtype != np.bool_:
        raise TypeError(f"{name}: got dtype {m.dtype}, expected bool")
    if m.shape != x.shape[:-1]:
        raise ValueError(f"{name}: got shape {m.shape}, expected {x.shape[:-1]}")
    return m


def _moments(rows: Float32, eps: float) -> tuple[Float32, Float32]:
    mean = rows.mean(axis=0, dtype=np.float64)
    deviation = np.sqrt(np.square(rows - mean).mean(axis=0) + eps)
    return mean.astype(np.float32), deviation.astype(np.float32)


METHOD = Method(
    name="cross_image_attention",
    family="vision",
    title="Cross-Image Attention for Zero-Shot Appearance Transfer",
    year=2023,
    arxiv="2311.03335",
    function=cross_image_attention,
    reference=reference.cross_image_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "A contrast of 1 gives attention, and so self-attention of an image with itself.",
        "A contrast of 0 gives the mean value.",
        "Equal weights stay as they are.",
    ),
    tests="tests/vision/test_cross_image_attention.py",
    cost="`Hq * Lq * Lk * (2 * D + Dv)` multiply-adds.",
    mask=lambda: seen(cross_image_attention, *example()),
)
