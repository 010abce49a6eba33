"""Attention of each place of an image to the text of its region, regions being what boxes overlap to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import attention_inputs, check_floating, check_heads, integer, scale_factor
from longattn.dense.attention_varlen import attention_varlen
from longattn.methods import Method
from longattn.pictures import example
from longattn.reference import vision as reference
from longattn.vision._inputs import window_sizes


def regional_cross_attention(
    q: Array,
    k: Array,
    v: Array,
    regions: Array,
    *,
    lengths: Array | None = None,
    null: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Cross-attention of every place to the tokens of its own region only.

    Places of a region go together, so each looks at one text, whatever the number of regions. `box_regions` makes
    regions of boxes, and `region_texts` their tokens of the boxes'. How well boxes overlap does not weigh in.

    Args:
        q: queries `[B, Hq, Y, X, D]`; float32, float16 or bfloat16.
        k: keys of the regions' texts `[B, Hkv, R, T, D]`; any of the three dtypes.
        v: values `[B, Hkv, R, T, Dv]`; dtype of `k`.
        regions: integers `[Y, X]`, or `[B, Y, X]`: the region of each place, 0 to `R - 1`, or -1 for none.
        lengths: tokens of each text, integers `[R]` or `[B, R]`, at most `T`; `None`: all.
        null: floating `[Hq, Dv]`: what places without a region get; `None` is zeros, as is the result of a text without
            tokens.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        `[B, Hq, Y, X, Dv]`, in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * Y * X * T * (D + Dv)` multiply-adds per image, and copies of queries and texts in the order of regions.

    References:
        J. Cheng et al., "Rethinking The Training And Evaluation of Rich-Context Layout-to-Image Generation", 2024,
        arXiv:2409.04847.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> regions, members = longattn.vision.box_regions(np.array([[0, 0, 0.6, 1], [0.4, 0, 1, 1]]), (8, 8))
        >>> q = rng.standard_normal((1, 2, 8, 8, 16), dtype=np.float32)
        >>> k, v = rng.standard_normal((2, 1, 2, len(members), 7, 16), dtype=np.float32)
        >>> longattn.vision.regional_cross_attention(q, k, v, regions).shape
        (1, 2, 8, 8, 16)
    """
    qn, kn, vn = attention_inputs(q, k, v, ranks=(5,))
    batch, heads, height, width, dim = qn.shape
    kv_heads, count, tokens = kn.shape[1:4]
    for x, name in ((kn, "k"), (vn, "v")):
        if x.shape[0] != batch:
            raise ValueError(f"{name}: got batch {x.shape[0]}, expected {batch} as in q")
    check_heads(heads, kv_heads, vn.shape[1])
    if vn.shape[2:4] != kn.shape[2:4]:
        raise ValueError(f"v: got {vn.shape[2:4]} regions and tokens, expected {kn.shape[2:4]} as in k")
    of = _numbers(regions, "regions", ((height, width), (batch, height, width)), -1, count - 1)
    of = reshaped(np.broadcast_to(of, (batch, height, width)), batch, -1)
    each = np.full((batch, count), tokens)
    if lengths is not None:
        each = np.broadcast_to(_numbers(lengths, "lengths", ((count,), (batch, count)), 0, tokens), (batch, count))
    factor = scale_factor(scale, dim)
    out = np.zeros((batch, height * width, heads, vn.shape[4]), qn.dtype)
    if null is not None:
        row = as_numpy(null, "null", any_strides=True)
        check_floating(row, "null")
        if row.shape != out.shape[2:]:
            raise ValueError(f"null: got shape {row.shape}, expected {out.shape[2:]}")
        out[of < 0] = row.astype(qn.dtype)
    # Places of all images, image by image and region by region, are sequences of one packed call.
    numbers = np.where(of < 0, -1, of + count * np.arange(batch)[:, None]).ravel()
    order = np.argsort(numbers, kind="stable")[np.count_nonzero(numbers < 0) :]
    if order.size:
        held = np.arange(tokens) < each.reshape(-1, 1)
        rows = qn.transpose(0, 2, 3, 1, 4).reshape(-1, heads, dim)[order]
        keys, values = (
            x.transpose(0, 2, 3, 1, 4).reshape(batch * count, tokens, kv_heads, x.shape[4])[held] for x in (kn, vn)
        )
        ends_q = np.concatenate([[0], np.cumsum(np.bincount(numbers[order], minlength=batch * count))])
        ends_k = np.concatenate([[0], np.cumsum(each.ravel())])
        flat = out.reshape(-1, heads, vn.shape[4])
        flat[order] = attention_varlen(rows, keys, values, ends_q, ends_k, scale=factor)
    shape = (batch, height, width, heads, vn.shape[4])
    return like(q, np.ascontiguousarray(out.reshape(shape).transpose(0, 3, 1, 2, 4)))


def box_regions(boxes: Array, shape: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Disjoint regions of an image: places covered by the same boxes.

    A box covers the places whose centres lie in it. Regions are numbered by the boxes that cover them, those of the
    first box first.

    Args:
        boxes: floating `[n, 4]`: `x0, y0, x1, y1` of each, in parts of the image's width and height.
        shape: places of the image, `(Y, X)`.

    Returns:
        Int64 `[Y, X]`, -1 where no box is; and booleans `[R, n]`: the boxes of each region.

    Raises:
        TypeError: no floating array.
        ValueError: another shape, or numbers that are not finite.

    Cost:
        A pass over boxes and places, and a sort of the places.
    """
    b = as_numpy(boxes, "boxes", any_strides=True)
    check_floating(b, "boxes")
    if b.ndim != 2 or b.shape[1] != 4:
        raise ValueError(f"boxes: got shape {b.shape}, expected [n, 4]")
    b = b.astype(np.float64)
    if not np.isfinite(b).all():
        raise ValueError("boxes: got NaN or infinity, expected finite numbers")
    height, width = window_sizes(shape, 2, "shape")
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    across = (x >= b[:, :1]) & (x < b[:, 2:3])
    down = (y >= b[:, 1:2]) & (y < b[:, 3:])
    if not len(b):
        return np.full((height, width), -1), np.zeros((0, 0), bool)
    covered = reshaped((down[:, :, None] & across[:, None]), len(b), -1).T
    # Inverted, those of the first box come first, and those of none last.
    found, numbers = np.unique(~covered, axis=0, return_inverse=True)
    members = ~found[~found.all(axis=1)]
    regions = np.asarray(numbers, np.int64).reshape(height, width)
    return np.where(regions < len(members), regions, -1), members


def region_texts(tokens: Array, members: Array, *, lengths: Array | None = None) -> tuple[Array, NDArray[np.int64]]:
    """The tokens of each region: those of its boxes one after another, in the order of the boxes.

    Args:
        tokens: `[n, T, C]`: those of each box (separators included); float32, float16 or bfloat16.
        members: booleans `[R, n]`, as `box_regions` gives them.
        lengths: tokens of each box, integers `[n]`, at most `T`; `None`: all.

    Returns:
        `[R, T', C]` in the kind and dtype of `tokens`, zeros after a region's tokens, and int64 `[R]`: how many it has.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        The result.
    """
    t = as_numpy(tokens, "tokens")
    if t.ndim != 3:
        raise ValueError(f"tokens: got shape {t.shape}, expected [n, T, C]")
    of = as_numpy(members, "members", any_strides=True)
    if of.dtype != np.bool_ or of.ndim != 2 or of.shape[1] != len(t):
        raise ValueError(f"members: got {of.dtype} of shape {of.shape}, expected bool [R, {len(t)}]")
    each = np.full(len(t), t.shape[1])
    if lengths is not None:
        each = _numbers(lengths, "lengths", ((len(t),),), 0, t.shape[1])
    totals = of @ each
    made = np.zeros((len(of), int(totals.max(initial=0)), t.shape[2]), t.dtype)
    for region, boxes in zip(made, of, strict=True):
        at = 0
        for n in np.flatnonzero(boxes):
            region[at : at + each[n]] = t[n, : each[n]]
            at += each[n]
    return like(tokens, made), totals.astype(np.int64)


def fourier_boxes(boxes: Array, *, frequencies: int = 8) -> NDArray[np.float32]:
    """Sines and cosines of boxes' coordinates, which tell a text where it belongs.

    Args:
        boxes: floating `[n, 4]`, in parts of the image.
        frequencies: 1, 2, 4 .. times pi.

    Returns:
        Float32 `[n, 8 * frequencies]`: for each frequency the sines of the four coordinates, then the cosines.

    Raises:
        TypeError: no floating array.
        ValueError: another shape.

    Cost:
        The result.
    """
    b = as_numpy(boxes, "boxes", any_strides=True)
    check_floating(b, "boxes")
    if b.ndim != 2 or b.shape[1] != 4:
        raise ValueError(f"boxes: got shape {b.shape}, expected [n, 4]")
    count = integer(frequencies, "frequencies", 1)
    angles = np.pi * 2.0 ** np.arange(count)[:, None] * b.astype(np.float64)[:, None]
    both = np.stack([np.sin(angles), np.cos(angles)], axis=2)
    return both.reshape(len(b), 8 * count).astype(np.float32)


def _numbers(x: Array, name: str, shapes: tuple[tuple[int, ...], ...], low: int, high: int) -> NDArray[np.int64]:
    a: NDArray[Any] = as_numpy(x, name, any_strides=True)
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {a.dtype}, expected integers")
    if a.shape not in shapes:
        raise ValueError(f"{name}: got shape {a.shape}, expected {' or '.join(map(str, shapes))}")
    if a.size and not low <= a.min() <= a.max() <= high:
        raise ValueError(f"{name}: got numbers from {a.min()} to {a.max()}, expected {low} to {high}")
    return a.astype(np.int64)


def _example() -> NDArray[np.bool_]:
    """Places of an image and the texts of its regions."""
    boxes = np.array([[0.0, 0.0, 0.6, 0.7], [0.4, 0.3, 1.0, 1.0], [0.1, 0.5, 0.5, 0.9]])
    regions, members = box_regions(boxes, (12, 12))
    q, k = example(144)
    count, tokens = len(members), 12
    shape = (1, 1, count, tokens)
    v = reshaped(np.eye(count * tokens, dtype=np.float32), *shape, -1)
    out = regional_cross_attention(
        q.reshape(1, 1, 12, 12, -1), reshaped(k[:, :, : count * tokens], *shape, -1), v, regions
    )
    mask: NDArray[np.bool_] = np.asarray(out).reshape(144, -1) != 0
    return mask


METHOD = Method(
    name="regional_cross_attention",
    family="vision",
    title="Rethinking The Training And Evaluation of Rich-Context Layout-to-Image Generation",
    year=2024,
    arxiv="2409.04847",
    function=regional_cross_attention,
    reference=reference.regional_cross_attention,
    exact=True,
    modes=frozenset({"non-causal", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "One box over everything is cross-attention to its text.",
        "Boxes that do not overlap are cross-attention with a mask for each.",
        "All regions computed for all places, masked and added up, are the same.",
        "The order of the boxes does not matter where the order of their texts does not.",
    ),
    tests="tests/vision/test_regional_cross_attention.py",
    cost="`Hq * Y * X * T * (D + Dv)` multiply-adds per image.",
    mask=_example,
)
