"""Block-sparse attention over frames: blocks of patches by means, and all special tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like
from longattn._checks import batched, dense_inputs, flag, integer, real, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._choosing import choose, pooled_scores
from longattn.sparse._selecting import block_bounds, selector_inputs
from longattn.sparse.block_mask import BlockMask, fitted
from longattn.sparse.block_sparse_attention import block_sparse_attention
from longattn.sparse.sparse_attention import SparseStats


def hilbert_order(height: int, width: int) -> NDArray[np.int64]:
    """Patches of a frame, numbered row by row, along a Hilbert curve: neighbours on it are near one another.

    Args:
        height: rows of patches.
        width: patches of a row.

    Returns:
        `[height * width]`: the patch at each place, for `order` of `pooled_block_select_cdf`. The curve fills the
        square of a power of two around the frame; what lies outside is passed over.

    Raises:
        TypeError: a number that is not an integer.
        ValueError: a number below 1.
    """
    height = integer(height, "height", 1)
    width = integer(width, "width", 1)
    side = 1 << (max(height, width) - 1).bit_length()
    y, x = (a.ravel().copy() for a in np.mgrid[:height, :width])
    place = np.zeros(height * width, np.int64)
    step = side // 2
    while step:
        right, low = (x & step) > 0, (y & step) > 0
        place += step * step * ((3 * right) ^ low)
        flip = ~low & right
        x, y = np.where(flip, side - 1 - x, x), np.where(flip, side - 1 - y, y)
        x, y = np.where(low, x, y), np.where(low, y, x)
        step //= 2
    return np.argsort(place, kind="stable")


def pooled_block_select_cdf(
    q: Array,
    k: Array,
    v: Array,
    *,
    frames: int,
    special: int = 5,
    tau: float | None = 0.97,
    rho: float | None = 0.1,
    block_q: int = 128,
    block_k: int = 64,
    order: Array | None = None,
    scale: float | None = None,
    return_stats: bool = False,
) -> Any:
    """Attention over the tokens of several frames, dense for special tokens and over chosen blocks for patches.

    Each frame has `special` tokens, then patches. Special tokens attend to everything. Patches attend to all special
    tokens, and by blocks to patches: with the softmax over the means of groups of patches, a block of queries takes the
    fewest groups that have a share `tau`, and at least a part `1 - rho` of their number (rounded down; both count where
    both are given), but one at least. A group that holds the last patches and special tokens is always taken.

    The pooling by largest numbers and the rounded products that the original offers besides are not offered. The
    original's rule stops one group earlier; here the share is reached.

    Args:
        q: queries `[B, Hq, N, D]`, or `[Hq, N, D]`; float32, float16 or bfloat16; `N` tokens, frame after frame.
        k: keys `[B, Hkv, N, D]`, or `[Hkv, N, D]`; any of the three dtypes.
        v: values `[B, Hkv, N, Dv]`, or `[Hkv, N, Dv]`; dtype of `k`.
        frames: number of frames, a divisor of `N`.
        special: tokens at the beginning of each frame that are no patches.
        tau: share of the softmax over means, from 1 on all; `None` does not use it.
        rho: part of the groups that may be left out, 0 to 1; `None` does not use it.
        block_q: patches of a block of queries.
        block_k: patches of a group of keys.
        order: integers, a permutation of a frame's patches by which they are grouped (`hilbert_order`).
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_stats: also return `SparseStats` of the patches' attention.

    Returns:
        The output `[B, Hq, N, Dv]` (or `[Hq, N, Dv]`), in the kind and dtype of `q`; with `return_stats` the pair
        `(output, stats)`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or neither `tau` nor `rho`.

    Cost:
        Per query head: `(N / block_q) (N / block_k) D` multiply-adds to choose, copies of the patches,
        `frames * special * N * (D + Dv)` for special tokens and `(D + Dv)` per query and key of the chosen groups.

    References:
        C. B. Wang et al., "Faster VGGT with Block-Sparse Global Attention", 2025, arXiv:2509.07120.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4 * 105, 16), dtype=np.float32)
        >>> out = la.sparse.pooled_block_select_cdf(q, k, v, frames=4, tau=1.0)
        >>> np.allclose(out, la.attention(q, k, v), atol=1e-5)
        True
    """
    q3, k3, v3 = dense_inputs(q, k, v)
    qn, kn = selector_inputs(q3, k3)
    vn, return_stats = batched(v3, 4), flag(return_stats, "return_stats")
    batch, heads, tokens, dim = qn.shape
    frames, special = integer(frames, "frames", 1), integer(special, "special", 0)
    patches = _check_frames(tokens, kn.shape[2], frames, special)
    block_q = integer(block_q, "block_q", 1)
    block_k = integer(block_k, "block_k", 1)
    share, least = _rules(tau, rho, -(-frames * patches // block_k))
    factor = scale_factor(scale, dim)
    of_patches, of_special = _places(frames, special, patches, order)
    pq = np.take(qn, of_patches, axis=2)
    pk, pv = (np.take(x, np.append(of_patches, of_special), axis=2) for x in (kn, vn))
    count = len(of_patches)
    bounds = block_bounds(count, block_q), block_bounds(count, block_k)
    groups, every = len(bounds[1]) - 1, -(-pk.shape[2] // block_k)
    scores = pooled_scores(pq, pk[:, :, :count], factor, bounds, np.full(len(bounds[0]) - 1, groups))
    # Groups of special tokens alone have no score, and none is needed.
    scores = np.pad(scores, ((0, 0), (0, 0), (0, 0), (0, every - groups)))
    rows = np.ones(len(bounds[0]) - 1, np.int64)
    forced = rows * (count // block_k if len(of_special) else every), rows * every
    indptr, indices = choose(scores, rows * every, forced=forced, share=share, least=least, counts=False)
    mask = BlockMask(
        indptr=indptr,
        indices=indices,
        **fitted((count, pk.shape[2]), block_q, block_k),
        scored=batch * heads * len(rows) * groups,
    )
    out = np.empty((batch, heads, tokens, vn.shape[3]), q3.dtype)
    out[:, :, of_patches] = block_sparse_attention(pq, pk, pv, mask, scale=factor)
    if len(of_special):
        out[:, :, of_special] = attention(np.take(qn, of_special, axis=2), kn, vn, scale=factor)
    result = like(q, out.reshape(*q3.shape[:-1], vn.shape[3]))
    return (result, SparseStats.of(mask, causal=False)) if return_stats else result


def _check_frames(tokens: int, keys: int, count: int, first: int) -> int:
    """Patches of a frame."""
    if keys != tokens:
        raise ValueError(f"k: got {keys} tokens, expected {tokens} as in q")
    if tokens % count or tokens // count < first:
        raise ValueError(f"frames: got {count} of {tokens} tokens, expected frames of one length, at least {first}")
    return tokens // count - first


def _rules(tau: float | None, rho: float | None, groups: int) -> tuple[float, int]:
    """Share and number of groups."""
    if tau is None and rho is None:
        raise ValueError("tau: got None, as is rho, expected one of them")
    share = 0.0 if tau is None else real(tau, "tau")
    left_out = 1.0 if rho is None else real(rho, "rho")
    if not 0 <= left_out <= 1:
        raise ValueError(f"rho: got {rho}, expected 0 to 1")
    if not share >= 0:
        raise ValueError(f"tau: got {tau}, expected at least 0")
    return share, max(1, int(np.floor(groups * (1 - left_out) + 1e-9)))


def _places(
    frames: int, special: int, patches: int, order: Array | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where patches, in their order, and special tokens are."""
    inside = np.arange(patches)
    if order is not None:
        given = np.asarray(order)
        if given.dtype.kind not in "iu":
            raise TypeError(f"order: got dtype {given.dtype}, expected integers")
        if given.shape != inside.shape or (np.sort(given) != inside).any():
            raise ValueError(f"order: got an array {given.shape}, expected a permutation of {patches} patches")
        inside = given.astype(np.int64)
    starts = np.arange(frames)[:, None] * (special + patches)
    return (starts + special + inside).ravel(), (starts + np.arange(special)).ravel()


METHOD = Method(
    name="pooled_block_select_cdf",
    family="sparse",
    title="Faster VGGT with Block-Sparse Global Attention",
    year=2025,
    arxiv="2509.07120",
    function=pooled_block_select_cdf,
    reference=reference.pooled_block_select_cdf,
    exact=False,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "With `rho` 0, or `tau` 1, it is dense attention.",
        "With groups of one patch it takes the fewest patches that have the share of the true weights.",
        "Taking the mean key off all keys leaves the output unchanged.",
        "Without special tokens it is block-sparse attention over all tokens.",
        "The order of patches changes how they are grouped only.",
    ),
    tests="tests/sparse/test_pooled_block_select_cdf.py",
    cost="`(N / block_q) (N / block_k) D` multiply-adds per query head to choose, copies of the patches.",
    mask=lambda: seen(pooled_block_select_cdf, *example(), frames=4, special=4, tau=0.6, rho=0.8, block_q=7, block_k=7),
)
