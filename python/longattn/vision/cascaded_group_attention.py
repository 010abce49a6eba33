"""Cascaded group attention: heads with a part of the channels each, fed with the output of the head before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import flag, integer, items_of
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, grid, head_count, numbers, odd_kernel, returned
from longattn.vision.convolution import depthwise_convolution
from longattn.vision.partition import attend, pad_ends, padded_to, partition, unpartition
from longattn.vision.positions import absolute_offset_bias


def cascaded_group_attention(
    x: Array,
    wqkv: Sequence[Weights],
    kernels: Sequence[Any],
    wo: Weights,
    *,
    key_dim: int,
    tables: Array | None = None,
    window: int | None = None,
    cascade: bool = True,
) -> Array:
    """Heads in a row, each with its own slice of the channels, to which the output of the head before is added.

    For head `i`: `f = x_i + y_(i-1)` (the first has `x_1`), `[q | k | v] = f wqkv_i`, `q` goes through a depth-wise
    convolution over the image, and `y_i` is attention with a bias by `|dy|` and `|dx|`. The output is
    `relu([y_1 .. y_h]) wo`. Heads depend on each other and run one after the other, each on all threads.

    Batch norms are folded into weights and biases.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16.
        wqkv: for each of `h` heads weights `[C / h, 2 * key_dim + Dv]`, or a pair `(matrix, bias)`; with `cascade`
            `Dv = C / h`.
        kernels: for each head the convolution of the queries, floating `[k, k, key_dim]`, odd `k`, or a pair with the
            bias.
        wo: output projection `[h * Dv, Co]`, or a pair.
        key_dim: channels of queries and keys.
        tables: biases, floating `[h, n ** 2]` (`[h, H * W]` without windows): entry `|dy| * n + |dx|`; `None` is
            none.
        window: places of a window per axis; the image is padded with zeros after its ends, padding is seen, and
            convolutions stop at a window's border. `None`, or no less than the image: no windows.
        cascade: add the output of the head before.

    Returns:
        `[B, H, W, Co]` in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `N ** 2 * h * (key_dim + Dv)` multiply-adds for the `N` places of a window, and the projections.

    References:
        X. Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention", 2023,
        arXiv:2305.07027.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 7, 7, 16), dtype=np.float32)
        >>> wqkv = [rng.standard_normal((8, 4 + 4 + 8), dtype=np.float32) for _ in range(2)]
        >>> kernels = [rng.standard_normal((5, 5, 4), dtype=np.float32) for _ in range(2)]
        >>> longattn.vision.cascaded_group_attention(x, wqkv, kernels, np.eye(16), key_dim=4).shape
        (1, 7, 7, 16)
    """
    xn = grid(x, "x")
    batch, height, width, channels = xn.shape
    dim, adds = integer(key_dim, "key_dim", 1), flag(cascade, "cascade")
    wqkv, kernels = items_of(wqkv, "wqkv", "weights"), items_of(kernels, "kernels", "arrays")
    number = head_count(len(wqkv), {"x": channels}, "heads of wqkv")
    if len(kernels) != number:
        raise ValueError(f"kernels: got {len(kernels)}, expected {number} as in wqkv")
    slice_width = channels // number
    heads = [_Head.of(w, k, n, slice_width, dim, adds) for n, (w, k) in enumerate(zip(wqkv, kernels, strict=True))]
    project = Linear.of(wo, "wo", sum(head.value_dim for head in heads))
    side = None if window is None else integer(window, "window", 1)
    shape = (height, width) if side is None or side >= max(height, width) else (side, side)
    biases = None
    if tables is not None:
        biases = absolute_offset_bias(numbers(tables, "tables", (number, shape[0] * shape[1])), shape)
    padded = pad_ends(xn, padded_to((height, width), shape))
    images = partition(padded, shape).reshape(-1, *shape, channels)
    parts: list[Float32] = []
    for n, head in enumerate(heads):
        own = images[..., n * slice_width : (n + 1) * slice_width]
        bias = None if biases is None else biases[n : n + 1]
        parts.append(head(own + parts[-1] if adds and parts else own, bias))
    out = project(np.maximum(np.concatenate(parts, axis=-1), 0))
    groups = reshaped(out, batch, -1, shape[0] * shape[1], out.shape[-1])
    whole = unpartition(groups, padded.shape[1:3], shape)
    return returned(x, whole[:, :height, :width])


class _Head:
    """One head: its projection and the convolution of its queries."""

    __slots__ = ("dim", "kernel", "kernel_bias", "project", "value_dim")

    def __init__(self, project: Linear, kernel: Float32, kernel_bias: Float32 | None, dim: int) -> None:
        self.project, self.kernel, self.kernel_bias, self.dim = project, kernel, kernel_bias, dim
        self.value_dim = project.outputs - 2 * dim

    @classmethod
    def of(cls, w: Weights, kernel: Any, n: int, width: int, dim: int, cascade: bool) -> _Head:
        project = Linear.of(w, f"wqkv[{n}]", width, 2 * dim + width if cascade else None)
        if project.outputs <= 2 * dim:
            raise ValueError(f"wqkv[{n}]: got {project.outputs} outputs, expected more than {2 * dim}")
        pair = isinstance(kernel, tuple | list)
        taps = odd_kernel(kernel[0] if pair else kernel, f"kernels[{n}]", (None, None, dim))
        return cls(project, taps, numbers(kernel[1], f"kernels[{n}] bias", (dim,)) if pair else None, dim)

    def __call__(self, x: Float32, bias: Float32 | None) -> Float32:
        """Attention inside each image `[n, H, W, width]`."""
        qkv = self.project(x)
        q = depthwise_convolution(qkv[..., : self.dim], self.kernel, bias=self.kernel_bias)
        rows = (
            reshaped(a, len(x), -1, a.shape[-1])
            for a in (q, qkv[..., self.dim : 2 * self.dim], qkv[..., 2 * self.dim :])
        )
        out: Float32 = attend(*rows, heads=1, bias=bias).reshape(*x.shape[:3], self.value_dim)
        return out


def _example() -> NDArray[np.bool_]:
    """What places see in windows."""

    def layer(x: Array, wq: Float32, wk: Float32, wv: Float32) -> Array:
        weights, tap = np.concatenate([wq, wk, wv], axis=1), np.ones((1, 1, wq.shape[1]), np.float32)
        return cascaded_group_attention(x, [weights], [tap], np.eye(len(wv)), key_dim=wq.shape[1], window=4)

    return layer_seen(layer, (12, 12))


METHOD = Method(
    name="cascaded_group_attention",
    family="vision",
    title="EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention",
    year=2023,
    arxiv="2305.07027",
    function=cascaded_group_attention,
    reference=reference.cascaded_group_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "One head with a kernel that changes nothing and no table is attention and a relu.",
        "One head is attention with convolved queries and the bias by magnitudes of offsets.",
        "Without the cascade heads are attentions of their own slices.",
        "A window no smaller than the image is none.",
    ),
    tests="tests/vision/test_cascaded_group_attention.py",
    cost="`N ** 2 * h * (key_dim + Dv)` multiply-adds for the `N` places of a window, and the projections.",
    mask=_example,
)
