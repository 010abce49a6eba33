"""Deformable attention of a video with tokens of another modality, and attention by sampled points."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import integer
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference_functions
from longattn.vision._deformable import Offsets
from longattn.vision._inputs import (
    Float32,
    Linear,
    Weights,
    features,
    grid,
    head_count,
    optional_linear,
    projections,
    returned,
)
from longattn.vision.partition import attend
from longattn.vision.sample import sample


def deformable_kv_attention_3d(
    z: Array,
    wq: Weights,
    wk: Weights,
    wv: Weights,
    *,
    heads: int,
    offset_kernel: Array,
    offset_weights: Array,
    offset_norm: tuple[Array, Array] | None = None,
    modality: Array | None = None,
    stride: int = 1,
    range_factor: float = 2.0,
    reference: str = "corners",
    wo: Weights | None = None,
) -> Array:
    """Attention of a video's tokens, and of those of another modality, to features sampled at predicted positions.

    A depth-wise convolution of `z`, a gelu and a projection to three numbers give the offset of each point of a coarse
    grid in time and space. Queries are `[modality ; z]`, keys and values `[modality ; samples]`. The paper leaves open
    the network's details, the range and whether channels are grouped; this is deformable attention of images
    (`deformable_kv_attention_2d`) in three dimensions, without groups.

    Args:
        z: grid `[B, T, H, W, C]`; float32, float16 or bfloat16.
        wq: query weights `[C, heads * D]`, or a pair `(matrix, bias)`.
        wk: key weights, likewise.
        wv: value weights `[C, heads * Dv]`, likewise.
        heads: heads.
        offset_kernel: floating `[kt, kh, kw, C]`.
        offset_weights: floating `[C, 3]`.
        offset_norm: `(weight, bias)` of a layer norm between them; `None` is none.
        modality: tokens `[B, m, C]` (of poses, say), floating; `None` is none.
        stride: places from one point to the next, along each axis.
        range_factor: as in `deformable_kv_attention_2d`.
        reference: likewise.
        wo: output projection, or `None`.

    Returns:
        `[B, m + T * H * W, heads * Dv]`, or as `wo` has it, in the kind and dtype of `z`: the modality's tokens first.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * (m + N) * (m + n) * C` multiply-adds for `N` tokens and `n` points, and the projections.

    References:
        S. Kim et al., "Cross-Modal Learning with 3D Deformable Attention for Action Recognition", 2022,
        arXiv:2212.05638.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> z = rng.standard_normal((1, 2, 4, 4, 8), dtype=np.float32)
        >>> w = rng.standard_normal((3, 8, 8), dtype=np.float32)
        >>> network = {"offset_kernel": np.ones((1, 2, 2, 8)), "offset_weights": rng.standard_normal((8, 3))}
        >>> longattn.vision.deformable_kv_attention_3d(z, *w, heads=2, stride=2, **network).shape
        (1, 32, 8)
    """
    zn = grid(z, "z", 3)
    batch, channels = len(zn), zn.shape[-1]
    q_of, k_of, v_of, number = projections(channels, wq, wk, wv, heads)
    network = Offsets.of(
        offset_kernel, offset_weights, offset_norm, stride=stride, range_factor=range_factor,
        reference=reference, channels=channels, dims=3,
    )  # fmt: skip
    project = optional_linear(wo, "wo", v_of.outputs)
    tokens = reshaped(zn, batch, -1, channels)
    samples = sample(zn, reshaped(network.positions(zn), batch, -1, 3))
    if modality is not None:
        other = features(modality, "modality", 3, "[B, m, C]", (batch, None, channels))
        tokens, samples = (np.concatenate([other, rows], axis=1) for rows in (tokens, samples))
    out = attend(q_of(tokens), k_of(samples), v_of(samples), heads=number)
    return returned(z, out if project is None else project(out))


def point_attention(
    z: Array,
    wv: Weights,
    offsets: Weights,
    weights: Weights,
    *,
    heads: int,
    points: int = 4,
    wo: Weights | None = None,
) -> Array:
    """Sums of values sampled around each place, with weights that come from the place alone.

    For each place and head `points` offsets and logits are projections of its features; there is no product of queries
    and keys. `out = sum over points of softmax(logits) * value at (place + offset)`, offsets in places.

    Args:
        z: grid `[B, X1, .., Xn, C]`, n = 1 to 3; float32, float16 or bfloat16.
        wv: value weights `[C, heads * Dv]`, or a pair `(matrix, bias)`.
        offsets: weights `[C, points * heads * n]`, or a pair; by point, head and axis, the axis fastest.
        weights: weights of the logits `[C, points * heads]`, or a pair.
        heads: heads.
        points: samples per head.
        wo: output projection, or `None`.

    Returns:
        `[B, X1, .., Xn, heads * Dv]`, or as `wo` has it, in the kind and dtype of `z`. Beyond the grid there are zeros.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `N * points * heads * 2 ** n * Dv` multiply-adds for `N` places, and the projections.
    """
    zn = grid(z, "z", (1, 2, 3))
    channels, extents = zn.shape[-1], zn.shape[1:-1]
    dims, taps = len(extents), integer(points, "points", 1)
    v_of = Linear.of(wv, "wv", channels)
    number = head_count(heads, {"wv": v_of.outputs})
    by = Linear.of(offsets, "offsets", channels, taps * number * dims)
    logits_of = Linear.of(weights, "weights", channels, taps * number)
    project = optional_linear(wo, "wo", v_of.outputs)
    shape = (len(zn), *extents, taps, number)
    at = by(zn).reshape(*shape, dims) + place_numbers(extents)[..., None, None, :]
    shares = softmax_over(logits_of(zn).reshape(shape), axis=-2)
    coords, factors = (at, shares) if number > 1 else (at[..., 0, :], shares[..., 0])
    out = sample(v_of(zn), coords, weights=factors, groups=number, coordinates="pixel")
    return returned(z, out if project is None else project(out))


def place_numbers(extents: tuple[int, ...]) -> Float32:
    """Coordinates of every place in places, `[X1, .., Xn, n]`."""
    return np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in extents), indexing="ij"), axis=-1)


def softmax_over(logits: Float32, axis: int) -> Float32:
    """Softmax of a few numbers along an axis."""
    e = np.exp(logits - logits.max(axis=axis, keepdims=True))
    shares: Float32 = e / e.sum(axis=axis, keepdims=True)
    return shares


def _example() -> NDArray[np.bool_]:
    """Places of a video that four samples are made of, the same for all queries."""
    rng = np.random.default_rng(0)
    kernel, weights = rng.standard_normal((3, 3, 3, 108)), 0.03 * rng.standard_normal((108, 3))
    network: Any = {"offset_kernel": kernel, "offset_weights": weights, "reference": "symmetric"}
    return layer_seen(deformable_kv_attention_3d, (3, 6, 6), heads=1, stride=3, **network)


METHOD = Method(
    name="deformable_kv_attention_3d",
    family="vision",
    title="Cross-Modal Learning with 3D Deformable Attention for Action Recognition",
    year=2022,
    arxiv="2212.05638",
    function=deformable_kv_attention_3d,
    reference=reference_functions.deformable_kv_attention_3d,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=False,
    step=False,
    checks=(
        "Offsets of zero without another modality give attention.",
        "A video of one frame gives what the operator for images gives.",
        "One point without offset gives the value at the place.",
    ),
    tests="tests/vision/test_deformable_kv_attention_3d.py",
    cost="`2 * (m + N) * (m + n) * C` multiply-adds for `N` tokens and `n` points, and the projections.",
    mask=_example,
    axes=("queries", "places"),
)
