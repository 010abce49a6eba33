"""Rectified block-sparse attention: what chosen blocks miss is made up for from means."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import batched, dense_inputs, flag, integer, one_of, real, scale_factor
from longattn.dense.attention import attention
from longattn.dense.merge import merge
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._call import check_fit
from longattn.sparse._choosing import block_mass, choose
from longattn.sparse._selecting import block_bounds, block_means, selector_inputs
from longattn.sparse.block_mask import BlockMask, fitted
from longattn.sparse.block_sparse_attention import block_sparse_attention
from longattn.sparse.sparse_attention import Selector, SparseStats

#: What may be done for blocks that are not chosen.
COMPENSATE = ("certain", "none")


def rectified_block_sparse(
    q: Array,
    k: Array,
    v: Array,
    *,
    text: int = 0,
    block: int = 128,
    tau: float = 0.6,
    top_k: int = 1,
    neighbours: Array | None = None,
    first_frame_blocks: int = 0,
    selector: Selector | None = None,
    compensate: str = "certain",
    weigh_last: bool = True,
    scale: float | None = None,
    return_stats: bool = False,
) -> Any:
    """Attention over chosen blocks, corrected by an estimate from means of those that are not.

    The tokens are of a video, in blocks, and then `text` of a text. Text queries attend to everything. Means of
    queries and keys, with the single text keys, give a softmax; a block's column stands for all of its tokens, so `P`
    is this with `block` times the blocks' weights, normalised. A block of queries takes the fewest best blocks whose
    `P` reaches `tau`, but at least `top_k`, with `neighbours`, and all text.

    A block that is not taken is compensated where its mean logit is certain: where the magnitude of `mean q . mean k`
    is above `|deviation of q . mean k| + |mean q . deviation of k|`, a deviation being the mean distance from the mean
    in each number. The output is `R` times the attention over what was taken, plus the sum of `P * mean v` over what is
    compensated, with `R = 1 - sum of these P`.

    Args:
        q: queries `[B, Hq, N, D]`, or `[Hq, N, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, N, D]`, or `[Hkv, N, D]`; any of the three dtypes.
        v: values `[B, Hkv, N, Dv]`, or `[Hkv, N, Dv]`; dtype of `k`.
        text: last tokens that are text.
        block: video tokens of a block.
        tau: share of `P`, from 1 on all blocks are taken.
        top_k: blocks that are taken at least.
        neighbours: booleans `[blocks, blocks]`, blocks that are taken besides.
        first_frame_blocks: the first so many blocks of queries take the first so many blocks besides.
        selector: chooses blocks of the video in place of `tau` and `top_k`, of `block` tokens or multiples of them; one
            of `longattn.sparse`, or any function of that form. What it leaves out is made up for in the same way.
        compensate: "certain" as above, or "none": plain block-sparse attention.
        weigh_last: whether a last block that is not full counts as many tokens as it has; else as the others.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_stats: also return `SparseStats` of the video's attention.

    Returns:
        The output `[B, Hq, N, Dv]` (or `[Hq, N, Dv]`), in the kind and dtype of `q`; with `return_stats` the pair
        `(output, stats)`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Per query head: `(N / block) (N / block + text) D` multiply-adds to choose and thrice `(N / block)^2 D` to
        compensate, two passes over queries and keys, `text * N * (D + Dv)` for text queries and `(D + Dv)` per query
        and key of the chosen blocks; with a selector its own cost besides.

    References:
        X. Liu et al., "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation", 2025.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 600, 16), dtype=np.float32)
        >>> out = la.sparse.rectified_block_sparse(q, k, v, text=24, block=64, tau=1.0)
        >>> np.allclose(out, la.attention(q, k, v), atol=1e-5)
        True
    """
    q3, k3, v3 = dense_inputs(q, k, v)
    qn, kn = selector_inputs(q3, k3)
    vn, return_stats = batched(v3, 4), flag(return_stats, "return_stats")
    flag(weigh_last, "weigh_last")
    batch, heads, tokens, dim = qn.shape
    if kn.shape[2] != tokens:
        raise ValueError(f"k: got {kn.shape[2]} tokens, expected {tokens} as in q")
    text = integer(text, "text", 0, tokens)
    block = integer(block, "block", 1)
    top_k = integer(top_k, "top_k", 0)
    first_frame_blocks = integer(first_frame_blocks, "first_frame_blocks", 0)
    if not real(tau, "tau") >= 0:
        raise ValueError(f"tau: got {tau}, expected at least 0")
    one_of(compensate, "compensate", COMPENSATE)
    if selector is not None and not callable(selector):
        raise TypeError(f"selector: got {type(selector).__name__}, expected a selector")
    factor, video = scale_factor(scale, dim), tokens - text
    bounds = block_bounds(video, block)
    n = len(bounds) - 1
    marks = _marks(neighbours, n, first_frame_blocks)
    vq, vk, vv = (x[:, :, :video] for x in (qn, kn, vn))
    mean_q, mean_k = block_means(vq, bounds), block_means(vk, bounds)
    columns = np.concatenate([mean_k, kn[:, :, video:].astype(np.float32)], axis=2)
    weights = block_mass(mean_q, columns, factor, limits=np.full(n, n + text))
    shares = _shares(weights, np.diff(bounds) if weigh_last else np.full(n, block), n)
    scored = batch * heads * n * (n + text)
    if selector is None or not n:
        indptr, indices = choose(shares, np.full(n, n), marks=marks, share=tau, least=max(top_k, 1), counts=False)
        mask = BlockMask(indptr=indptr, indices=indices, **fitted((video, video), block, block), scored=scored)
    else:
        mask = _chosen(selector, vq, vk, block, factor, marks, scored)
    out = np.empty((batch, heads, tokens, vn.shape[3]), q3.dtype)
    state = attention(vq, kn[:, :, video:], vn[:, :, video:], scale=factor, return_lse=True) if text else None
    kept = block_sparse_attention(vq, vk, vv, mask, state=state, scale=factor)
    if compensate == "certain" and n:
        taken = np.repeat(mask.blocks(), heads // mask.shape[1], axis=1)
        made_up = np.where(taken | ~_certain(vq, vk, bounds, mean_q, mean_k), np.float32(0), shares)
        kept = _rectified(kept, made_up, block_means(vv, bounds), np.diff(bounds))
    out[:, :, :video] = kept
    if text:
        out[:, :, video:] = attention(qn[:, :, video:], kn, vn, scale=factor)
    result = like(q, out.reshape(*q3.shape[:-1], vn.shape[3]))
    return (result, SparseStats.of(mask, causal=False)) if return_stats else result


def _chosen(
    selector: Selector,
    q: NDArray[Any],
    k: NDArray[Any],
    block: int,
    scale: float,
    marks: NDArray[np.bool_],
    scored: int,
) -> BlockMask:
    """What a selector chooses, and what is marked, over blocks of `block` tokens."""
    chosen = selector(q, k, causal=False, scale=scale)
    if not isinstance(chosen, BlockMask):
        raise TypeError(f"selector: got {type(chosen).__name__} from it, expected a BlockMask")
    check_fit(chosen, "selector", q.shape, k.shape)
    sizes = fitted((q.shape[2], k.shape[2]), block, block)
    mask: BlockMask = chosen | BlockMask.from_blocks(marks, **sizes, scored=scored)
    if (mask.block_q, mask.first_q, mask.block_k) != (sizes["block_q"], sizes["block_q"], sizes["block_k"]):
        got = f"{chosen.block_q} queries and {chosen.block_k} keys"
        raise ValueError(f"selector: got blocks of {got} from it, expected multiples of {block}")
    return mask


def _marks(neighbours: Array | None, blocks: int, first: int) -> NDArray[np.bool_]:
    """Blocks that are taken besides the best."""
    marks = np.zeros((blocks, blocks), bool)
    if neighbours is not None:
        given = as_numpy(neighbours, "neighbours")
        if given.dtype != bool:
            raise TypeError(f"neighbours: got dtype {given.dtype}, expected bool")
        if given.shape != marks.shape:
            raise ValueError(f"neighbours: got shape {given.shape}, expected {marks.shape}")
        marks |= given
    marks[:first, :first] = True
    return marks


def _shares(weights: NDArray[np.float32], counts: NDArray[np.int64], blocks: int) -> NDArray[np.float32]:
    """`P` of the blocks: their columns stand for as many tokens."""
    of_blocks = weights[..., :blocks] * counts.astype(np.float32)
    total = of_blocks.sum(axis=-1, keepdims=True) + weights[..., blocks:].sum(axis=-1, keepdims=True)
    total[total <= 0] = 1
    shares: NDArray[np.float32] = of_blocks / total
    return shares


def _certain(
    q: NDArray[Any],
    k: NDArray[Any],
    bounds: NDArray[np.int64],
    mean_q: NDArray[np.float32],
    mean_k: NDArray[np.float32],
) -> NDArray[np.bool_]:
    """Whether the product of the means is larger than what deviations may change, `[B, Hq, blocks, blocks]`."""
    of_q, of_k = (
        _core.block_deviations(x, bounds, np.ascontiguousarray(mean).ravel()).reshape(mean.shape)
        for x, mean in ((q, mean_q), (k, mean_k))
    )
    group = q.shape[1] // k.shape[1]
    mean_k, of_k = (np.repeat(x, group, axis=1).swapaxes(-1, -2) for x in (mean_k, of_k))
    certain: NDArray[np.bool_] = np.abs(mean_q @ mean_k) > np.abs(of_q @ mean_k) + np.abs(mean_q @ of_k)
    return certain


def _rectified(
    kept: NDArray[Any], shares: NDArray[np.float32], mean_v: NDArray[np.float32], counts: NDArray[np.int64]
) -> NDArray[Any]:
    """`(1 - sum of shares) * kept + shares @ mean_v`, as two parts of one softmax."""
    group = kept.shape[1] // mean_v.shape[1]
    total = np.minimum(shares.sum(axis=-1), np.float32(1))
    mean: NDArray[np.float32] = shares @ np.repeat(mean_v, group, axis=1)
    mean /= np.where(total > 0, total, np.float32(1))[..., None]
    with np.errstate(divide="ignore"):
        parts = np.log1p(-total), np.log(total)
    rows = [np.repeat(x, counts, axis=2) for x in (mean, *parts)]
    merged: NDArray[Any] = np.asarray(merge([(kept, rows[1]), (rows[0].astype(kept.dtype), rows[2])])[0])
    return merged


METHOD = Method(
    name="rectified_block_sparse",
    family="sparse",
    title="Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
    year=2025,
    arxiv="2511.19835",
    function=rectified_block_sparse,
    reference=reference.rectified_block_sparse,
    exact=False,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "With all blocks taken it is dense attention.",
        "Where queries, keys and values are equal inside every block it is dense attention for any `tau`.",
        "Without compensation it is block-sparse attention.",
        "With equal values it gives these: the factors of a row sum to 1.",
        "With a selector of all blocks it is dense attention.",
    ),
    tests="tests/sparse/test_rectified_block_sparse.py",
    cost="`(N / block) (4 N / block + text) D` per query head to choose and compensate, and the attention.",
    mask=lambda: seen(rectified_block_sparse, *example(), text=8, block=8, tau=0.5, compensate="none"),
)
