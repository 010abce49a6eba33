"""Embedding-free attention: pooled keys that are their own values, and queries without a projection."""

from __future__ import annotations

from longattn._arrays import Array, reshaped
from longattn._checks import integer
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import Weights, grid, head_count, optional_linear, returned
from longattn.vision.convolution import mean_pool_cells
from longattn.vision.partition import attend


def embedding_free_attention(
    x: Array, ws: Weights | None = None, *, heads: int, reduction: int = 1, wo: Weights | None = None
) -> Array:
    """Attention with `q = x` and `k = v = pool(x) ws`, the means of cells of `reduction` x `reduction` places.

    Weights do not depend on `reduction`, which may be larger at inference than it was in training.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16.
        ws: weights of the pooled features `[C, C]`, or a pair `(matrix, bias)`; `None` is none.
        heads: heads.
        reduction: places of a cell per axis; those that do not fill a cell at the ends are in none.
        wo: output projection `[C, Co]`, or a pair; `None` is none.

    Returns:
        `[B, H, W, C]`, or `[B, H, W, Co]` with `wo`, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, a cell larger than the grid.

    Cost:
        `2 * (H * W) ** 2 / reduction ** 2 * C` multiply-adds, and the projections.

    References:
        H. Yu et al., "Embedding-Free Transformer with Inference Spatial Reduction for Efficient Semantic
        Segmentation", 2024, arXiv:2407.17261.

    Example:
        >>> import numpy as np, longattn.vision
        >>> x = np.random.default_rng(0).standard_normal((1, 8, 8, 16), dtype=np.float32)
        >>> longattn.vision.embedding_free_attention(x, heads=2, reduction=2).shape
        (1, 8, 8, 16)
    """
    xn = grid(x, "x")
    batch, height, width, channels = xn.shape
    number = head_count(heads, {"x": channels})
    cell = integer(reduction, "reduction", 1, min(height, width))
    of_cells, project = optional_linear(ws, "ws", channels, channels), optional_linear(wo, "wo", channels)
    pooled = reshaped(mean_pool_cells(xn, (cell, cell)), batch, -1, channels)
    keys = pooled if of_cells is None else of_cells(pooled)
    out = attend(reshaped(xn, batch, -1, channels), keys, keys, heads=number).reshape(xn.shape)
    return returned(x, out if project is None else project(out))


METHOD = Method(
    name="embedding_free_attention",
    family="vision",
    title="Embedding-Free Transformer with Inference Spatial Reduction for Efficient Semantic Segmentation",
    year=2024,
    arxiv="2407.17261",
    function=embedding_free_attention,
    reference=reference.embedding_free_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Without pooling and weights it is attention of `x` to itself.",
        "One cell gives its mean at every place.",
        "The reduction of training is the default path: the same call gives the same bits.",
    ),
    tests="tests/vision/test_embedding_free_attention.py",
    cost="`2 * (H * W) ** 2 / reduction ** 2 * C` multiply-adds, and the projections.",
)
