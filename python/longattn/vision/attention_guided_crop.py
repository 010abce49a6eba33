"""Crops around the patches that the class token attends to, and a soft match of crops and descriptions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_floating, finite, integer, real
from longattn.dense.attention_weights import attention_weights
from longattn.methods import Method
from longattn.pictures import example
from longattn.reference import vision as reference
from longattn.vision._inputs import grid, numbers, window_sizes
from longattn.vision.sample import sample


def attention_guided_crop(
    weights: Array,
    shape: tuple[int, int],
    *,
    crops: int,
    top: int,
    ratio: tuple[float, float] = (0.5, 0.9),
    temperature: float = 0.03,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Random boxes around patches of much attention.

    Of the `top` patches of largest weight a centre is drawn, with replacement, by `softmax(weight / temperature)`;
    height and width are uniform shares of the image's; what lies outside is cut off.

    Args:
        weights: attention of the class token to the patches, floating `[B, H * W]`; see `cls_attention`.
        shape: `(H, W)`, patches of the image.
        crops: boxes of each image.
        top: patches that may be centres; of equal weights the first.
        ratio: least and largest share of the image's height and width, above 0 and at most 1.
        temperature: above 0.
        seed: of the draws.

    Returns:
        Boxes `(y0, x0, y1, x1)` in patches, float64 `[B, crops, 4]`: times a patch's size they are pixels, and
        `crop_features` cuts grids by them.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        A sort of the weights.

    References:
        L. Cai et al., "From Local Details to Global Context: Advancing Vision-Language Models with Attention-Based
        Selection", 2025, arXiv:2505.13233.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k = np.random.default_rng(0).standard_normal((2, 1, 3, 65, 16), dtype=np.float32)
        >>> weights = longattn.vision.cls_attention(q, k)
        >>> longattn.vision.attention_guided_crop(weights, (8, 8), crops=5, top=10).shape
        (1, 5, 4)
    """
    size = np.array(window_sizes(shape, 2, "shape"), np.float64)
    patches = int(size.prod())
    a = as_numpy(weights, "weights")
    check_floating(a, "weights")
    if a.ndim != 2 or a.shape[1] != patches:
        raise ValueError(f"weights: got shape {a.shape}, expected [B, {patches}]")
    a = np.asarray(a, np.float64)
    if not np.isfinite(a).all():
        raise ValueError("weights: got numbers that are not finite")
    count, kept = integer(crops, "crops", 1), integer(top, "top", 1, patches)
    if not isinstance(ratio, tuple | list) or len(ratio) != 2:
        raise TypeError(f"ratio: got {ratio!r}, expected a pair")
    low, high = (real(r, "ratio") for r in ratio)
    if not 0 < low <= high <= 1:
        raise ValueError(f"ratio: got {ratio}, expected 0 < least <= largest <= 1")
    heat = finite(temperature, "temperature")
    if heat <= 0:
        raise ValueError(f"temperature: got {temperature}, expected above 0")
    generator = np.random.default_rng(integer(seed, "seed", 0))
    best = np.argsort(-a, axis=1, kind="stable")[:, :kept]
    chosen = np.take_along_axis(a, best, axis=1)
    p = np.exp((chosen - chosen[:, :1]) / heat)
    ends = np.cumsum(p / p.sum(axis=1, keepdims=True), axis=1)
    draws, shares = generator.random((len(a), count)), generator.uniform(low, high, (len(a), count, 2))
    place = (draws[..., None] >= ends[:, None, :-1]).sum(axis=-1)
    patch = np.take_along_axis(best, place, axis=1)
    centres = np.stack([patch // int(size[1]), patch % int(size[1])], axis=-1) + 0.5
    half = shares * size / 2
    return np.concatenate([np.maximum(centres - half, 0), np.minimum(centres + half, size)], axis=-1)


def cls_attention(q: Array, k: Array, *, prefix: int = 1, scale: float | None = None) -> Array:
    """Attention of the first token to the patches, averaged over heads; no other row of weights is computed.

    Args:
        q: queries of all tokens, or of the first alone, `[B, Hq, L, D]`; float32, float16 or bfloat16.
        k: keys of all tokens `[B, Hkv, N, D]`; any of the three dtypes.
        prefix: tokens before the patches.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        Float32 `[B, N - prefix]` in the kind of `q`: means of the softmax weights over all tokens, those before the
        patches left out.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * N * D` multiply-adds.
    """
    qn = as_numpy(q, "q")
    if qn.ndim != 4 or qn.shape[2] == 0:
        raise ValueError(f"q: got shape {qn.shape}, expected [B, Hq, L, D] with at least 1 token")
    w = np.asarray(attention_weights(qn[:, :, :1], k, [0], scale=scale))
    first = integer(prefix, "prefix", 0, w.shape[-1])
    return like(q, np.ascontiguousarray(w[:, :, 0, first:].mean(axis=1)))


def crop_features(x: Array, boxes: Array, shape: tuple[int, int]) -> Array:
    """Crops of a grid, resized by linear interpolation between the centres of places.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16.
        boxes: floating `[B, crops, 4]`, `(y0, x0, y1, x1)` in places of the grid, as `attention_guided_crop` has them.
        shape: places `(h, w)` of a crop.

    Returns:
        `[B, crops, h, w, C]` in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Four multiply-adds per number of the crops.
    """
    xn = grid(x, "x")
    given = as_numpy(boxes, "boxes")
    if given.ndim != 3 or given.shape[0] != len(xn) or given.shape[2] != 4:
        raise ValueError(f"boxes: got shape {given.shape}, expected [{len(xn)}, crops, 4]")
    check_floating(given, "boxes")
    b = np.asarray(given, np.float64)
    height, width = window_sizes(shape, 2, "shape")
    at = np.empty((*b.shape[:2], height, width, 2))
    for axis, n in enumerate((height, width)):
        steps = (np.arange(n) + 0.5) / n
        line = b[..., axis, None] + steps * (b[..., axis + 2] - b[..., axis])[..., None] - 0.5
        at[..., axis] = line[..., :, None] if axis == 0 else line[..., None, :]
    return sample(x, at, coordinates="pixel", padding="border")


def soft_match(similarity: Array, classes: Array, *, temperature: float = 0.03) -> NDArray[np.float32]:
    """Scores of classes from the similarities of crops to descriptions, each weighed by a softmax over all of these.

    Args:
        similarity: cosines `[..., crops, descriptions]`, floating.
        classes: class of each description, integers `[descriptions]`, from 0 on.
        temperature: above 0.

    Returns:
        Float32 `[..., classes]`: sums over crops and a class's descriptions of
        `softmax(similarity / temperature) * similarity / temperature`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        An exponential per number.
    """
    s = as_numpy(similarity, "similarity")
    wide = numbers(similarity, "similarity", (None,) * s.ndim)
    ids = as_numpy(classes, "classes")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"classes: got dtype {ids.dtype}, expected integers")
    if s.ndim < 2 or ids.shape != s.shape[-1:] or (ids.size and ids.min() < 0):
        raise ValueError(f"classes: got shape {ids.shape}, expected {s.shape[-1:]}, from 0 on")
    heat = finite(temperature, "temperature")
    if heat <= 0:
        raise ValueError(f"temperature: got {temperature}, expected above 0")
    logits = wide / np.float32(heat)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    of_description = (p / p.sum(axis=-1, keepdims=True) * logits).sum(axis=-2)
    members = (ids[:, None] == np.arange(int(ids.max(initial=-1)) + 1)).astype(np.float32)
    return np.asarray(of_description @ members, np.float32)


def _example() -> NDArray[np.bool_]:
    """Patches that crops are made of."""
    weights = cls_attention(*example(65))
    boxes = attention_guided_crop(weights, (8, 8), crops=24, top=12, ratio=(0.2, 0.6), temperature=1.0)
    cut = crop_features(np.eye(64, dtype=np.float32).reshape(1, 8, 8, 64), boxes, (8, 8))
    mask: NDArray[np.bool_] = (np.asarray(cut)[0] != 0).any(axis=(1, 2))
    return mask


METHOD = Method(
    name="attention_guided_crop",
    family="vision",
    title="From Local Details to Global Context: Advancing Vision-Language Models with Attention-Based Selection",
    year=2025,
    arxiv="2505.13233",
    function=attention_guided_crop,
    reference=reference.attention_guided_crop,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "One patch to choose from is that of largest weight.",
        "At a high temperature all patches to choose from are as likely.",
        "The class token's weights are the first row of all weights.",
    ),
    tests="tests/vision/test_attention_guided_crop.py",
    cost="`Hq * N * D` multiply-adds for the weights, and a sort.",
    mask=_example,
    axes=("crops", "patches"),
)
