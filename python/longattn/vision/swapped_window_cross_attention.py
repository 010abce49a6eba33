"""Cross-attention in windows between spatial and temporal features, which change roles from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from longattn._arrays import Array
from longattn._checks import integer
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._blocks import Block
from longattn.vision._inputs import grid, head_count, returned, same_shape, window_sizes
from longattn.vision.partition import attend_in_groups, pad_ends, padded_to


def swapped_window_cross_attention(
    spatial: Array, temporal: Array, weights: Any, *, heads: int, windows: int | Sequence[int], step: int = 0
) -> Array:
    """Attention of one kind of features to the other, in non-overlapping windows of a video.

    At even steps queries are of `spatial` and keys and values of `temporal`, at odd ones the other way round; what
    comes out is added to what asked. A video is padded with zeros after its ends; padding is not seen. The size of the
    windows, and whether they hold all frames, is not stated; it is an argument.

    Args:
        spatial: features `[B, F, H, W, C]`; float32, float16 or bfloat16.
        temporal: features of the same shape.
        weights: `(wq, wk, wv, wo)`, `[C, C]` each, pairs `(matrix, bias)`, or `None`.
        heads: heads.
        windows: places of a window `(f, h, w)`, or one number for all axes.
        step: number of the block, from 0 on.

    Returns:
        The features that asked, in their shape, in the kind and dtype of `spatial`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * F * H * W * f * h * w * C` multiply-adds, and the projections; copies by windows.

    References:
        W. Wang et al., "VideoFactory: Swap Attention in Spatiotemporal Diffusions for Text-to-Video Generation", 2023,
        arXiv:2305.10874.

    Example:
        >>> import numpy as np, longattn.vision
        >>> s, t = np.random.default_rng(0).standard_normal((2, 1, 2, 4, 4, 8), dtype=np.float32)
        >>> plain = (None,) * 4
        >>> longattn.vision.swapped_window_cross_attention(s, t, plain, heads=2, windows=(2, 2, 2)).shape
        (1, 2, 4, 4, 8)
    """
    sn = grid(spatial, "spatial", 3)
    tn = same_shape(temporal, "temporal", sn, "spatial")
    block = Block.of(weights, "weights", sn.shape[-1], head_count(heads, {"spatial": sn.shape[-1]}))
    sizes = window_sizes(windows, 3, "windows")
    asks, answers = (sn, tn) if integer(step, "step", 0) % 2 == 0 else (tn, sn)
    extents = sn.shape[1:4]
    full = padded_to(extents, sizes)
    q, k, v = (pad_ends(a, full) for a in (block.q(asks), block.k(answers), block.v(answers)))
    found = attend_in_groups(q, k, v, sizes, heads=block.heads, valid=extents)
    out = block.o(np.ascontiguousarray(found[:, : extents[0], : extents[1], : extents[2]]))
    return returned(spatial, asks + out)


METHOD = Method(
    name="swapped_window_cross_attention",
    family="vision",
    title="VideoFactory: Swap Attention in Spatiotemporal Diffusions for Text-to-Video Generation",
    year=2023,
    arxiv="2305.10874",
    function=swapped_window_cross_attention,
    reference=reference.swapped_window_cross_attention,
    exact=True,
    modes=frozenset({"non-causal", "cross"}),
    gqa=False,
    step=False,
    checks=(
        "Equal features give self-attention in windows.",
        "A window of the whole video gives cross-attention.",
        "Steps change the roles.",
    ),
    tests="tests/vision/test_swapped_window_cross_attention.py",
    cost="`2 * F * H * W * f * h * w * C` multiply-adds, and the projections.",
    mask=lambda: layer_seen(
        lambda x, wq, wk, wv: swapped_window_cross_attention(x, x, (wq, wk, wv, None), heads=1, windows=(2, 2, 2)),
        (4, 4, 6),
    ),
)
