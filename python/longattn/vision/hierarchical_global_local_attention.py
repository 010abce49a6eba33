"""Attention in tiles of a video, plus attention of the whole video at a lower resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import finite, flag, integer
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._blocks import Block
from longattn.vision._inputs import Float32, Weights, grid, head_count, numbers, odd_kernel, returned
from longattn.vision.convolution import convolution, mean_pool_cells
from longattn.vision.partition import attend_in_groups
from longattn.vision.sample import resize


def hierarchical_global_local_attention(
    x: Array,
    local: Any,
    coarse: Any,
    *,
    heads: int,
    tiles: int,
    shifted: bool = False,
    alpha: float = 1.0,
    down: Array | None = None,
    up: Array | None = None,
) -> Array:
    """Dense attention in each tile of the image over all frames, plus that of a smaller video.

    `local + alpha * global`: the image is cut into `tiles` x `tiles`; the small video has one place for `tiles` x
    `tiles`, and what comes out is brought back to full size.

    Layers alternate between tiles and tiles that are shifted by half their size, so that borders are crossed. The
    kernels that reduce and enlarge, the factor and the scheme of shifts are not stated precisely; they are arguments.

    Args:
        x: video `[B, T, H, W, C]`, `H` and `W` multiples of `tiles`; float32, float16 or bfloat16.
        local: `(wq, wk, wv, wo)` of the tiles' attention, `[C, C]` each, pairs `(matrix, bias)`, or `None`.
        coarse: those of the small video's.
        heads: heads of both.
        tiles: tiles along each axis of the image.
        shifted: shift the tiles by half their size; places from opposite ends do not see each other.
        alpha: factor on the global part.
        down: convolution that reduces, floating `[1, tiles, tiles, C, C]`, stride `tiles`; `None` is the mean.
        up: convolution after linear enlarging, floating `[1, k, k, C, C]`, odd `k`; `None` is none.

    Returns:
        The video, in the shape, kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * N ** 2 / tiles ** 2 * C` multiply-adds for `N` tokens, and `2 * N ** 2 / tiles ** 4 * C`.

    References:
        "UltraGen: High-Resolution Video Generation with Hierarchical Attention", 2025.

    Example:
        >>> import numpy as np, longattn.vision
        >>> x = np.random.default_rng(0).standard_normal((1, 2, 8, 8, 16), dtype=np.float32)
        >>> plain = (None,) * 4
        >>> longattn.vision.hierarchical_global_local_attention(x, plain, plain, heads=2, tiles=2).shape
        (1, 2, 8, 8, 16)
    """
    xn = grid(x, "x", 3)
    _, frames, height, width, channels = xn.shape
    number = head_count(heads, {"x": channels})
    parts = integer(tiles, "tiles", 1)
    if height % parts or width % parts:
        raise ValueError(f"tiles: got {parts}, expected a divisor of {height} and {width}")
    near, far = Block.of(local, "local", channels, number), Block.of(coarse, "coarse", channels, number)
    reduce = None if down is None else numbers(down, "down", (1, parts, parts, channels, channels))
    enlarge = None if up is None else odd_kernel(up, "up", (1, None, None, channels, channels))
    weight = finite(alpha, "alpha")
    size = (frames, height // parts, width // parts)
    moved = flag(shifted, "shifted") and parts > 1
    rolls = (0, size[1] // 2, size[2] // 2) if moved else (0, 0, 0)
    out = near.o(attend_in_groups(near.q(xn), near.k(xn), near.v(xn), size, heads=number, rolls=rolls))
    if weight:
        out = out + weight * _global(xn, far, parts, reduce, enlarge)
    return returned(x, out)


def _global(x: Float32, block: Block, parts: int, down: Float32 | None, up: Float32 | None) -> Float32:
    steps: Sequence[int] = (1, parts, parts)
    small = mean_pool_cells(x, steps) if down is None else convolution(x, down, stride=steps, padding=0)
    seen = block(reshaped(small, len(x), -1, x.shape[-1])).reshape(small.shape)
    large: Float32 = resize(seen, x.shape[1:4])
    return large if up is None else convolution(large, up)


def _example() -> NDArray[np.bool_]:
    """What places see of two frames in their tiles, which are shifted; of the smaller video they see all."""

    def tiled(x: Array, wq: Weights, wk: Weights, wv: Weights) -> Array:
        none = (None,) * 4
        options: Any = {"heads": 1, "tiles": 2, "shifted": True, "alpha": 0.0}
        return hierarchical_global_local_attention(x, (wq, wk, wv, None), none, **options)

    return layer_seen(tiled, (2, 8, 8))


METHOD = Method(
    name="hierarchical_global_local_attention",
    family="vision",
    title="UltraGen: High-Resolution Video Generation with Hierarchical Attention",
    year=2025,
    arxiv="2510.18775",
    function=hierarchical_global_local_attention,
    reference=reference.hierarchical_global_local_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "One tile gives attention in the local part.",
        "With `alpha = 0` it is the local part.",
        "Without reduction the global part is attention.",
        "Tiles do not see each other, and shifted ones cross their borders.",
    ),
    tests="tests/vision/test_hierarchical_global_local_attention.py",
    cost="`2 * N ** 2 / tiles ** 2 * C` multiply-adds for `N` tokens, and `2 * N ** 2 / tiles ** 4 * C`.",
    mask=_example,
    shown="shifted tiles, without the smaller video",
)
