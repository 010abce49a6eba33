"""Deformable attention of an image: keys and values are sampled where a small network says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import flag, integer
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference_functions
from longattn.vision._deformable import Offsets
from longattn.vision._inputs import Float32, Linear, Weights, grid, numbers, optional_linear, projections, returned
from longattn.vision.convolution import mean_pool_cells
from longattn.vision.partition import attend
from longattn.vision.sample import sample, unit_grid


def deformable_kv_attention_2d(
    x: Array,
    wq: Weights,
    wk: Weights,
    wv: Weights,
    *,
    heads: int,
    offset_kernel: Array | None = None,
    offset_weights: Array | None = None,
    offset_norm: tuple[Array, Array] | None = None,
    groups: int = 1,
    stride: int = 1,
    range_factor: float = 2.0,
    reference: str = "code",
    bias_table: Array | None = None,
    bias_layers: tuple[Weights, Weights] | None = None,
    no_offset: bool = False,
    wo: Weights | None = None,
) -> Array:
    """Attention of all places of an image to the same few features, sampled at predicted positions.

    Channels of the queries are cut into `groups`. For each, a depth-wise convolution of stride `r`, a layer norm, a
    gelu and a projection to two numbers give the offset of each point of a coarse grid; the group's channels of `x` are
    sampled there. Keys and values are projections of the samples. A bias, where there is one, is sampled from a table
    at the difference of a query's and a point's position, or made from its logarithm by two layers.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16.
        wq: query weights `[C, C]`, or a pair `(matrix, bias)`.
        wk: key weights `[C, C]`, of the samples, or a pair.
        wv: value weights, likewise.
        heads: heads.
        offset_kernel: floating `[k, k, C / groups]`, the convolution of the queries' groups; padded by `k // 2`, or not
            at all where `k` is the stride.
        offset_weights: floating `[C / groups, 2]`, to an offset in y and one in x.
        offset_norm: `(weight, bias)` of the layer norm, `[C / groups]` each; `None` is none.
        groups: a divisor of `heads`.
        stride: places from one point to the next.
        range_factor: `f >= 0`: offsets are `f * tanh(.)` points of the coarse grid at most (in half-extents divided by
            its points less one); below 0: they are free, and positions stay inside the image (DAT++).
        reference: points before offsets: "code": `2 (i + 0.5) / (n - 1) - 1` as in the published code; "symmetric":
            `2 (i + 0.5) / n - 1`; "corners": `2 i / (n - 1) - 1`, which are the places themselves for stride 1.
        bias_table: floating `[heads, 2 * H - 1, 2 * W - 1]`; `None` is none.
        bias_layers: weights `[2, n]` and `[n, heads / groups]`, or pairs with biases, and a relu between them: of
            `sign(d) log2(|d| + 1) / 3` for `d` four times the difference in y and in x, where the image is 2 wide.
            Not beside a table.
        no_offset: samples are means of cells of `stride` x `stride` places instead; no offset weights then.
        wo: output projection, or `None`.

    Returns:
        `[B, H, W, C]`, or as `wo` has it, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * H * W * n * C` multiply-adds for `n = H * W / stride ** 2` points, and the projections. A bias is kept,
        `B * heads * H * W * n` numbers; while layers make it, `groups` times their width for each pair.

    References:
        Z. Xia et al., "Vision Transformer with Deformable Attention", 2022, arXiv:2201.00520; "DAT++: Spatially Dynamic
        Vision Transformer with Deformable Attention", 2023, arXiv:2309.01430.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 8, 8, 16), dtype=np.float32)
        >>> w = rng.standard_normal((3, 16, 16), dtype=np.float32)
        >>> network = {"offset_kernel": np.ones((3, 3, 8)), "offset_weights": rng.standard_normal((8, 2))}
        >>> longattn.vision.deformable_kv_attention_2d(x, *w, heads=4, groups=2, stride=2, **network).shape
        (1, 8, 8, 16)
    """
    xn = grid(x, "x")
    batch, height, width, channels = xn.shape
    q_of, k_of, v_of, number = projections(channels, wq, wk, wv, heads)
    if q_of.outputs != channels:
        raise ValueError(f"wq: got {q_of.outputs} outputs, expected {channels} as in x")
    parts, step = integer(groups, "groups", 1), integer(stride, "stride", 1, min(height, width))
    if number % parts or channels % parts:
        raise ValueError(f"groups: got {parts}, expected a divisor of {number} heads and {channels} channels")
    table = None if bias_table is None else numbers(bias_table, "bias_table", (number, 2 * height - 1, 2 * width - 1))
    project = optional_linear(wo, "wo", v_of.outputs)
    pooled = flag(no_offset, "no_offset")
    if pooled != (offset_kernel is None) or pooled != (offset_weights is None):
        expected = "no offset_kernel and offset_weights" if pooled else "offset_kernel and offset_weights"
        raise ValueError(f"no_offset: got {pooled}, expected {expected} with it")
    if pooled and table is not None:
        raise ValueError("bias_table: got one with no_offset, expected None")
    layers = None if bias_layers is None else _layers(bias_layers, number // parts)
    if layers is not None and (pooled or table is not None):
        raise ValueError(f"bias_layers: got some with {'no_offset' if pooled else 'a bias_table'}, expected None")
    q = q_of(xn)
    bias = None
    if pooled:
        samples = reshaped(mean_pool_cells(xn, (step, step)), batch, -1, channels)
    else:
        network = Offsets.of(
            offset_kernel, offset_weights, offset_norm, stride=step, range_factor=range_factor,
            reference=reference, channels=channels // parts, dims=2,
        )  # fmt: skip
        at = _positions(network, q, parts)
        samples = sample(xn, at if parts > 1 else at[:, :, 0], groups=parts)
        if table is not None:
            bias = _sampled_bias(table, at, (height, width))
        elif layers is not None:
            bias = _made_bias(*layers, at, (height, width))
    out = attend(reshaped(q, batch, -1, channels), k_of(samples), v_of(samples), heads=number, bias=bias)
    whole = reshaped(out, batch, height, width, -1)
    return returned(x, whole if project is None else project(whole))


def _positions(network: Offsets, q: Float32, groups: int) -> Float32:
    """Where each group samples, `[B, points, groups, 2]`."""
    batch, height, width, channels = q.shape
    each = np.moveaxis(q.reshape(batch, height, width, groups, channels // groups), 3, 1)
    at = network.positions(np.ascontiguousarray(each).reshape(-1, height, width, channels // groups))
    return np.moveaxis(reshaped(at, batch, groups, -1, 2), 1, 2)


def _sampled_bias(table: Float32, at: Float32, extents: tuple[int, int]) -> Any:
    """The table at half the difference of a query's and a point's position, `[B, heads, H * W, points]`."""
    batch, points, groups, _ = at.shape
    queries = unit_grid(extents).reshape(1, -1, 1, 1, 2).astype(np.float32)
    apart = 0.5 * (queries - at[:, None])
    image = np.ascontiguousarray(np.moveaxis(table, 0, -1))[None]
    values = sample(image, apart if groups > 1 else apart[:, :, :, 0], groups=groups)
    return np.moveaxis(reshaped(values, batch, -1, points, len(table)), -1, 1)


def _layers(given: Any, heads: int) -> tuple[Linear, Linear]:
    """Both layers of the network that makes biases of a group's heads."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(f"bias_layers: got {type(given).__name__}, expected two layers")
    first = Linear.of(given[0], "bias_layers[0]", 2)
    return first, Linear.of(given[1], "bias_layers[1]", first.outputs, heads)


def _made_bias(first: Linear, second: Linear, at: Float32, extents: tuple[int, int]) -> Any:
    """What the layers make of the logarithms of differences, `[B, heads, H * W, points]`."""
    batch, points, groups, _ = at.shape
    queries = unit_grid(extents).reshape(1, -1, 1, 1, 2).astype(np.float32)
    apart = 4 * (queries - at[:, None])
    values = second(np.maximum(first(np.sign(apart) * np.log2(np.abs(apart) + 1) / np.float32(3)), 0))
    heads = groups * second.outputs
    return np.moveaxis(reshaped(values, batch, -1, points, heads), -1, 1)


def _example() -> NDArray[np.bool_]:
    """Places that nine samples are made of, the same for all queries."""
    rng = np.random.default_rng(0)
    kernel, weights = rng.standard_normal((4, 4, 144)), 0.03 * rng.standard_normal((144, 2))
    network: Any = {"offset_kernel": kernel, "offset_weights": weights, "reference": "symmetric"}
    return layer_seen(deformable_kv_attention_2d, (12, 12), heads=1, stride=4, **network)


METHOD = Method(
    name="deformable_kv_attention_2d",
    family="vision",
    title="Vision Transformer with Deformable Attention",
    year=2022,
    arxiv="2201.00520",
    function=deformable_kv_attention_2d,
    reference=reference_functions.deformable_kv_attention_2d,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Offsets of zero at the places themselves give attention.",
        "Offsets of whole places give attention over the places they lead to.",
        "Without offsets it is attention to pooled features.",
    ),
    tests="tests/vision/test_deformable_kv_attention_2d.py",
    cost="`2 * H * W * n * C` multiply-adds for `n = H * W / stride ** 2` points, and the projections.",
    mask=_example,
    axes=("queries", "places"),
)
