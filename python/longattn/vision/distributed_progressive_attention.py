"""All-to-key attention: content attends to one key per region of a style, and to its best region."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import finite, integer, scale_factor
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.sparse.block_mask import BlockMask
from longattn.sparse.block_sparse_attention import block_sparse_attention
from longattn.vision._blocks import Block
from longattn.vision._inputs import Float32, Weights, grid, head_count, returned
from longattn.vision.partition import attend, partition, unpartition


def distributed_progressive_attention(
    content: Array,
    style: Array,
    distributed: tuple[Weights, Weights, Weights, Weights | None],
    progressive: tuple[Weights, Weights, Weights, Weights | None],
    *,
    heads: int = 8,
    region: int = 8,
    alpha: float = 1.0,
    beta: float = 0.0,
    scale: float = 1.0,
) -> Array:
    """`content` plus what two branches find in `style`.

    Queries come from content, keys from style, each normalised per channel over its places; values from style as it is.
    Regions are `region` x `region` places. The distributed branch has one key and value per region: the mean of the
    region's mean key and all its keys, each of which counts by `g = sigmoid(beta + alpha * mean . key)`, and the
    same of values. All of content attends to these. The progressive branch compares regions, place by place and summed,
    and each region of content attends to the places of the one style region that is most like it, the first of equals.

    Args:
        content: grid `[B, H, W, C]`, axes multiples of `region`; float32, float16 or bfloat16.
        style: grid `[B, H', W', C]`, likewise.
        distributed: `(wq, wk, wv, wo)` of the first branch, `[C, C]` each, or pairs `(matrix, bias)`; `wo` may be
            `None`.
        progressive: those of the second.
        heads: heads; regions are chosen per head.
        region: places of a region per axis.
        alpha: learned, see above.
        beta: learned, see above.
        scale: factor on the logits; the paper has none.

    Returns:
        The grid in the shape, kind and dtype of `content`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * N * (n + region ** 2) * C` multiply-adds for `N` places of content and `n` regions of style, and
        `N * n * C` to compare regions.

    References:
        M. Zhu et al., "All-to-key Attention for Arbitrary Style Transfer", 2022, arXiv:2212.04105.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> content, style = rng.standard_normal((2, 1, 16, 16, 8), dtype=np.float32)
        >>> w = tuple(rng.standard_normal((4, 8, 8), dtype=np.float32))
        >>> longattn.vision.distributed_progressive_attention(content, style, w, w, heads=2).shape
        (1, 16, 16, 8)
    """
    cn, sn = grid(content, "content"), grid(style, "style")
    channels = cn.shape[-1]
    if sn.shape[0] != cn.shape[0] or sn.shape[-1] != channels:
        raise ValueError(f"style: got shape {sn.shape}, expected batch and channels of content, {cn.shape}")
    number = head_count(heads, {"content": channels})
    side = integer(region, "region", 1)
    for x, name in ((cn, "content"), (sn, "style")):
        if x.shape[1] % side or x.shape[2] % side:
            raise ValueError(f"{name}: got shape {x.shape}, expected axes that are multiples of region {side}")
    first = Block.of(distributed, "distributed", channels, number)
    second = Block.of(progressive, "progressive", channels, number)
    factor = scale_factor(scale, channels // number)
    slope, offset = finite(alpha, "alpha"), finite(beta, "beta")
    from_content = partition(_normalised(cn), (side, side))
    from_style, plain = partition(_normalised(sn), (side, side)), partition(sn, (side, side))
    out = _distributed(from_content, from_style, plain, first, (slope, offset), factor)
    out += _progressive(from_content, from_style, plain, second, factor)
    return returned(content, cn + unpartition(out, cn.shape[1:3], (side, side)))


def _normalised(x: Float32) -> Float32:
    """Per channel, with the unbiased deviation over all places."""
    count = x.shape[1] * x.shape[2]
    centred = x - x.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    variance = np.square(centred).sum(axis=(1, 2), keepdims=True) / max(count - 1, 1)
    scaled: Float32 = (centred / np.sqrt(variance + 1e-5)).astype(np.float32)
    return scaled


def _distributed(
    content: Float32, style: Float32, plain: Float32, w: Block, gate: tuple[float, float], scale: float
) -> Float32:
    """Attention of all places to a key per region; all by regions, `[B, regions, places, C]`."""
    k, v = (reshaped(a, *a.shape[:3], w.heads, -1) for a in (w.k(style), w.v(plain)))
    centre, value = k.mean(axis=2), v.mean(axis=2)
    near = (k * centre[:, :, None]).sum(axis=-1)
    g = 1 / (1 + np.exp(-(gate[1] + gate[0] * near)))[..., None]
    share = 1 / (k.shape[2] + 1)
    keys, values = (((g * a).sum(axis=2) + mean) * share for a, mean in ((k, centre), (v, value)))
    flat = (reshaped(a, len(k), -1, w.heads * a.shape[-1]).astype(np.float32) for a in (keys, values))
    out: Float32 = attend(
        reshaped(w.q(content), len(content), -1, content.shape[-1]), *flat, heads=w.heads, scale=scale
    )
    out = out.reshape(content.shape)
    return w.o(out)


def _progressive(content: Float32, style: Float32, plain: Float32, w: Block, scale: float) -> Float32:
    """Attention of each region to the places of the region that is most like it."""
    batch, regions, places, channels = content.shape
    heads = w.heads
    q, k, v = (
        a.reshape(*a.shape[:3], heads, channels // heads).transpose(0, 3, 1, 2, 4)
        for a in (w.q(content), w.k(style), w.v(plain))
    )
    whole = (reshaped(np.ascontiguousarray(a), batch, heads, a.shape[2], -1) for a in (q, k))
    rows, columns = whole
    best = (rows @ columns.swapaxes(-1, -2)).argmax(axis=-1)
    lists = np.arange(regions + 1) + np.arange(batch * heads)[:, None] * regions
    mask = BlockMask(
        indptr=lists.reshape(batch, heads, regions + 1),
        indices=best.reshape(-1).astype(np.uint32),
        lengths=(regions * places, style.shape[1] * places),
        block_q=places,
        block_k=places,
        scored=batch * heads * regions * style.shape[1],
    )
    q, k, v = (reshaped(np.ascontiguousarray(a), batch, heads, -1, channels // heads) for a in (q, k, v))
    out = block_sparse_attention(q, k, v, mask, scale=scale).swapaxes(1, 2).reshape(content.shape)
    return w.o(out)


def _example() -> NDArray[np.bool_]:
    """What regions see by the progressive branch; by the other all see a mean of each region."""
    content = np.random.default_rng(0).standard_normal((1, 12, 12, 144), dtype=np.float32)

    def found(style: Array, wq: Float32, wk: Float32, wv: Float32) -> Float32:
        nothing, own = (wq, wk, np.zeros_like(wv), None), (wq, wk, wv, None)
        out = distributed_progressive_attention(content, style, nothing, own, heads=1, region=4, scale=0.01)
        return np.asarray(out) - content

    return layer_seen(found, (12, 12))


METHOD = Method(
    name="distributed_progressive_attention",
    family="vision",
    title="All-to-key Attention for Arbitrary Style Transfer",
    year=2022,
    arxiv="2212.04105",
    function=distributed_progressive_attention,
    reference=reference.distributed_progressive_attention,
    exact=True,
    modes=frozenset({"non-causal", "cross"}),
    gqa=False,
    step=False,
    checks=(
        "Regions of one place whose gates are 1 give cross-attention in the distributed branch.",
        "Regions of one place give the value of the most alike place in the progressive branch.",
        "One region gives cross-attention in the progressive branch, and one value in the distributed one.",
        "Style that is the content, in one region, gives self-attention in the progressive branch.",
    ),
    tests="tests/vision/test_distributed_progressive_attention.py",
    cost="`2 * N * (n + region ** 2) * C` multiply-adds for `N` places and `n` regions, and `N * n * C` to compare.",
    mask=_example,
    axes=("places of content", "places of style"),
    shown="the progressive branch alone",
)
