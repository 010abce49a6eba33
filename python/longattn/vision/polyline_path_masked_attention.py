"""Attention with decays along two-part paths between the places of an image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, reshaped
from longattn._checks import check_floating, dense_inputs, one_of, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, features, numbers, returned

#: How the two paths' maps are joined.
COMBINATIONS = ("logit_mean", "gate", "criss_cross")
#: Numbers of a block of biases, per head and batch.
BLOCK = 1 << 22


def polyline_path_masked_attention(
    q: Array,
    k: Array,
    v: Array,
    decay_x: Array,
    decay_y: Array,
    *,
    combine: str = "logit_mean",
    scale: float | None = None,
) -> Array:
    """Attention whose logits lose, from a query to a key, the decays of the places on the way between them.

    From `(y1, x1)` there are two ways to `(y2, x2)`: along the query's row, then the key's column, and along the
    query's column, then the key's row. The sum of the decays on the first is `M1`, on the second `M2` (its transpose).
    A stretch of a row from `x1` to `x2` has the decays of the places after the smaller up to the larger.

    Args:
        q: queries `[B, h, H, W, D]`; float32, float16 or bfloat16.
        k: keys `[B, h, H, W, D]`; any of the three dtypes.
        v: values `[B, h, H, W, Dv]`; dtype of `k`.
        decay_x: logarithms of the decays along rows, at most 0, floating `[B, H, W, h]`.
        decay_y: of those along columns, likewise.
        combine: "logit_mean": the mean of two attentions, with `M1` and `M2` added to the logits (published models);
            "gate": `(softmax(q k^T) * (exp(M1) + exp(M2))) v`, as the paper's text has it (whether it halves or
            normalises again is not stated; it does not here); "criss_cross": attention in rows and in columns one after
            the other, the mean of both orders, for large images.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        `[B, h, H, W, Dv]`, in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, decays above 0 or not finite.

    Cost:
        `2 * N ** 2 * (D + Dv)` multiply-adds per head for `N = H * W` places, and as many biases, which are made for
        some rows of the image at a time; "gate" three passes of keys instead of two. "criss_cross":
        `4 * N * (H + W) * D`.

    References:
        Z. Zhao et al., "Polyline Path Masked Attention for Vision Transformer", 2025.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 6, 8), dtype=np.float32)
        >>> decay = np.full((1, 5, 6, 2), -0.1)
        >>> longattn.vision.polyline_path_masked_attention(q, k, v, decay, decay).shape
        (1, 2, 5, 6, 8)
    """
    grids = [as_numpy(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v"))]
    for x, name in zip(grids, "qkv", strict=True):
        if x.ndim != 5 or x.shape[:4] != grids[0].shape[:4] or 0 in x.shape[1:]:
            raise ValueError(
                f"{name}: got shape {x.shape}, expected [B, h, H, W, D], the same but for D and none empty"
            )
    batch, heads, height, width, dim = grids[0].shape
    qn, kn, vn = dense_inputs(*(reshaped(x, batch, heads, height * width, -1) for x in grids), double=False)
    one_of(combine, "combine", COMBINATIONS)
    factor = scale_factor(scale, dim)
    steps = [
        _decays(x, name, (batch, height, width, heads)) for x, name in ((decay_x, "decay_x"), (decay_y, "decay_y"))
    ]
    if combine == "criss_cross":
        wide = [np.asarray(x, np.float32) for x in grids]
        return returned(q, _criss_cross(wide[0], wide[1], wide[2], steps[0], steps[1], factor))
    sums = [np.cumsum(x, axis=axis) for x, axis in zip(steps, (3, 2), strict=True)]
    rows, values = np.asarray(qn, np.float32), np.empty((*qn.shape[:3], vn.shape[3]), np.float32)
    lines = max(1, BLOCK // (height * width * width))
    for first in range(0, height, lines):
        last = min(first + lines, height)
        part = slice(first * width, last * width)
        values[:, :, part] = _both(rows[:, :, part], kn, vn, sums, (first, last), combine == "gate", factor)
    return returned(q, reshaped(values, *grids[0].shape[:4], -1))


def polyline_decays(
    x: Array, w_x: Array, w_y: Array, a_log: Array, *, bias: Array | None = None
) -> tuple[Float32, Float32]:
    """Decays of each place and head from its features: `-exp(a_log) * softplus(x_h . w + bias)`.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16; head `h` has the `h`-th of equal parts of the channels.
        w_x: floating `[C / heads]`, shared by the heads, of the decays along rows.
        w_y: of those along columns.
        a_log: floating `[heads]`.
        bias: floating `[heads]`; `None` is 0.

    Returns:
        The pair `(decay_x, decay_y)`, float32 `[B, H, W, heads]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        `2 * H * W * C` multiply-adds.
    """
    xn = features(x, "x", 4, "[B, H, W, C]")
    sizes = numbers(a_log, "a_log", (None,))
    if not sizes.size or xn.shape[-1] % sizes.size:
        raise ValueError(f"a_log: got {sizes.size} heads, expected a divisor of {xn.shape[-1]} channels")
    each = reshaped(xn, *xn.shape[:3], sizes.size, -1)
    added = 0.0 if bias is None else numbers(bias, "bias", (sizes.size,))
    found = []
    for w, name in ((w_x, "w_x"), (w_y, "w_y")):
        s = each @ numbers(w, name, (each.shape[-1],)) + added
        found.append((-np.exp(sizes) * np.logaddexp(0, s)).astype(np.float32))
    return found[0], found[1]


def polyline_mask_apply(v: Array, decay_x: Array, decay_y: Array) -> Array:
    """`exp(M1) v`: values summed over all places, decayed along each place's row and the others' columns.

    Args:
        v: values `[B, h, H, W, D]`; float32, float16 or bfloat16.
        decay_x: as in `polyline_path_masked_attention`.
        decay_y: likewise.

    Returns:
        `[B, h, H, W, D]` in the kind and dtype of `v`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `4 * H * W * D` multiply-adds per head: two scans along columns and two along rows.
    """
    vn = features(v, "v", 5, "[B, h, H, W, D]")
    batch, heads, height, width, _ = vn.shape
    shape = (batch, height, width, heads)
    along_x, along_y = _decays(decay_x, "decay_x", shape), _decays(decay_y, "decay_y", shape)
    columns = np.moveaxis(_scanned(np.moveaxis(vn, 2, 0), np.moveaxis(along_y, 2, 0)), 0, 2)
    rows = np.moveaxis(_scanned(np.moveaxis(columns, 3, 0), np.moveaxis(along_x, 3, 0)), 0, 3)
    return returned(v, rows)


def _scanned(v: NDArray[Any], decay: NDArray[np.float64]) -> NDArray[np.float32]:
    """Sums along the first axis in both directions, each place counted once; decays have no last axis."""
    factors = np.exp(decay)[..., None].astype(np.float32)
    forward, backward = np.array(v, np.float32), np.zeros(v.shape, np.float32)
    for t in range(1, len(v)):
        forward[t] += factors[t] * forward[t - 1]
    for t in range(len(v) - 2, -1, -1):
        backward[t] = factors[t + 1] * (backward[t + 1] + v[t + 1])
    return forward + backward


def _decays(x: Array, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """`[B, h, H, W]`, float64, as sums of them are subtracted from each other."""
    a = as_numpy(x, name, any_strides=True)
    check_floating(a, name)
    if a.shape != shape:
        raise ValueError(f"{name}: got shape {a.shape}, expected {shape}")
    wide = np.moveaxis(a.astype(np.float64), -1, 1)
    if not (np.isfinite(wide) & (wide <= 0)).all():
        raise ValueError(f"{name}: got numbers above 0 or not finite, expected logarithms of decays")
    return wide


def _both(
    q: Float32, k: NDArray[Any], v: NDArray[Any], sums: list[NDArray[np.float64]], lines: tuple[int, int], gate: bool,
    scale: float,
) -> Float32:  # fmt: skip
    """What some lines of queries get from both paths."""
    batch, heads, height, width = sums[0].shape
    along_x, along_y = (np.ascontiguousarray(s).reshape(-1) for s in sums)
    bias = np.empty((batch, heads, q.shape[2], height * width), np.float32)
    total = attention(q, k, v, scale=scale, return_lse=True)[1] if gate else None
    out = np.zeros((*q.shape[:3], v.shape[3]), np.float32)
    for first_y in (False, True):
        _core.path_bias(along_x, along_y, [height, width], first_y, lines, bias.reshape(-1))
        part, lse = attention(q, k, v, scale=scale, bias=bias, return_lse=True)
        # Weights of the plain softmax times exp(M) are those with M in the logits, times the ratio of the sums.
        out += part * (0.5 if total is None else np.exp(lse - total)[..., None])
    return out


def _criss_cross(
    q: Float32, k: Float32, v: Float32, along_x: NDArray[np.float64], along_y: NDArray[np.float64], scale: float
) -> Float32:
    """Half of columns after rows and half of rows after columns."""

    def lines(axis: int, values: Float32) -> Float32:
        sums = np.cumsum(along_x if axis == 3 else along_y, axis=axis)
        along = np.moveaxis(sums, axis, -1)
        bias = -np.abs(along[..., :, None] - along[..., None, :]).astype(np.float32)
        rows = [np.moveaxis(x, axis, -2) for x in (q, k, values)]
        length = bias.shape[-1]
        out = attention(
            *(np.ascontiguousarray(x).reshape(-1, 1, length, x.shape[-1]) for x in rows),
            scale=scale,
            bias=bias.reshape(-1, 1, length, length),
        )
        return np.moveaxis(out.reshape(rows[2].shape), -2, axis)

    return (lines(2, lines(3, v)) + lines(3, lines(2, v))) * np.float32(0.5)


def _example() -> NDArray[np.bool_]:
    """Places of an image with an object in it, whose outline no path survives."""
    inside = np.zeros((12, 12), bool)
    inside[3:9, 4:10] = True
    along = [-1e3 * np.diff(inside, axis=axis, prepend=False)[None, ..., None] for axis in (1, 0)]
    return seen(polyline_path_masked_attention, *example(144), *along, shape=(12, 12))


METHOD = Method(
    name="polyline_path_masked_attention",
    family="vision",
    title="Polyline Path Masked Attention for Vision Transformer",
    year=2025,
    arxiv="2506.15940",
    function=polyline_path_masked_attention,
    reference=reference.polyline_path_masked_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Decays of 0 give attention, and criss-cross attention in columns after attention in rows.",
        "In one row both paths are the row, and it is attention with the decays between the places.",
        "The paths' matrices are each other's transposes.",
        "The scans give what the matrix of the path gives.",
        "Strong decays leave each place its own value.",
    ),
    tests="tests/vision/test_polyline_path_masked_attention.py",
    cost="`2 * N ** 2 * (D + Dv)` multiply-adds per head for `N` places, and as many biases.",
    mask=_example,
    shown="decays that nothing survives around an object",
)
