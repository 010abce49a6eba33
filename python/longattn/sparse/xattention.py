"""XAttention: blocks by the sums along their antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import flag, scale_factor
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._choosing import block_mass, choose, own_blocks
from longattn.sparse._selecting import (
    block_bounds,
    head_numbers,
    keep_integers,
    key_limits,
    per_query_head,
    selector_inputs,
)
from longattn.sparse.block_mask import BlockMask, fitted
from longattn.sparse.composed import Composable
from longattn.sparse.sparse_attention import sparse_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Antidiagonal(Composable):
    """The prediction of XAttention: the fewest key blocks with enough of the antidiagonal weights.

    Queries and keys are cut into strides. The logit of a stride of queries and one of keys is the mean of the scaled
    dot products along their antidiagonal; a softmax over the strides of keys makes weights of these, which are summed
    over blocks. Each block of queries takes its own block and the first (where asked for), and then the best others
    until all have a share `threshold` of the sum.

    Args:
        threshold: that share, a number or `[Hq]`; from 1 on all blocks are taken.
        stride: queries and keys of a stride, a divisor of `block`.
        block: queries and keys of a block.
        sink: always take the first key block.
        own: always take the key blocks that the positions of the queries are in.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size below 1, or a stride that does not divide the block.
    """

    threshold: Any = 0.9
    stride: int = 8
    block: int = 128
    sink: bool = True
    own: bool = True

    def __post_init__(self) -> None:
        """Checks what does not depend on the heads."""
        keep_integers(self, block=1, stride=1)
        head_numbers(self.threshold, "threshold")
        if self.block % self.stride:
            raise ValueError(f"stride: got {self.stride}, expected a divisor of the block, {self.block}")
        flag(self.sink, "sink")
        flag(self.own, "own")

    def __call__(self, q: Array, k: Array, *, causal: bool = False, scale: float | None = None) -> BlockMask:
        """The mask, a list for each query head."""
        qn, kn = selector_inputs(q, k)
        causal = flag(causal, "causal")
        batch, heads, rows, dim = qn.shape
        keys, stride = kn.shape[2], self.stride
        share = per_query_head(self.threshold, "threshold", heads)
        bounds, bounds_k = block_bounds(rows, self.block), block_bounds(keys, self.block)
        of_q, of_k = (strides(x, stride, backwards) for x, backwards in ((qn, True), (kn, False)))
        seen = key_limits(block_bounds(rows, stride), (rows, keys), causal)
        mass = block_mass(
            of_q,
            of_k,
            scale_factor(scale, dim) / stride,
            limits=-(-seen // stride),
            row_bounds=-(-bounds // stride),
            blocks=(-(-bounds_k[:-1] // stride), -(-bounds_k[1:] // stride)),
        )
        limits = -(-key_limits(bounds, (rows, keys), causal) // self.block)
        here = own_blocks(bounds, (rows, keys), self.block) if self.own else None
        indptr, indices = choose(mass, limits, forced=here, sinks=int(self.sink), share=share, least=1)
        return BlockMask(
            indptr=indptr,
            indices=indices,
            **fitted((rows, keys), self.block, self.block),
            scored=batch * heads * of_q.shape[2] * of_k.shape[2],
        )


def strides(x: NDArray[Any], stride: int, backwards: bool) -> NDArray[Any]:
    """Rows of `stride` rows side by side, `[B, H, L / stride, stride * D]`, in their order or backwards."""
    batch, heads, length, dim = x.shape
    whole = -(-length // stride)
    if length % stride:
        x = np.concatenate([x, np.zeros((batch, heads, whole * stride - length, dim), x.dtype)], axis=2)
    cut = np.ascontiguousarray(x).reshape(batch, heads, whole, stride, dim)
    cut = cut[:, :, :, ::-1] if backwards else cut
    return np.ascontiguousarray(cut).reshape(batch, heads, whole, stride * dim)


def xattention(
    q: Array,
    k: Array,
    v: Array,
    *,
    threshold: float | Array = 0.9,
    stride: int = 8,
    block: int = 128,
    sink: bool = True,
    own: bool = True,
    causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Attention over the blocks whose antidiagonals carry most of the weight.

    Queries and keys are cut into strides of `stride` rows. The logit of a stride of queries and one of keys is the
    mean of the scaled dot products along their antidiagonal, which meets every vertical and every slanted line; a
    softmax over the strides of keys makes weights of these (causal between strides), which are summed over blocks.
    Each block of queries attends to its own block and the first (where asked for), and to the best others until all
    have a share `threshold` of the sum. A last stride that is not full is filled with zeros.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        threshold: share of the weights, a number or `[Hq]`; from 1 on it is dense attention.
        stride: queries and keys of a stride, a divisor of `block`.
        block: queries and keys of a block.
        sink: always take the first key block.
        own: always take the key blocks that the positions of the queries are in.
        causal: a query sees only keys at its own position and before.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        options: those of `sparse_attention`: `return_lse`, `return_stats`, `out`, `softcap`, `sinks`, ...

    Returns:
        The output as of `longattn.sparse_attention`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Choosing: `Lq * Lk / stride * D` multiply-adds per query head and a copy of the queries; attention: `(D + Dv)`
        per query and key of the chosen blocks.

    References:
        R. Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", 2025, arXiv:2503.16428.

    Example:
        >>> import numpy as np, longattn as la
        >>> rng = np.random.default_rng(0)
        >>> q, k = np.repeat(rng.standard_normal((2, 1, 16, 32), dtype=np.float32), 64, axis=2)
        >>> v = rng.standard_normal((1, 1024, 32), dtype=np.float32)
        >>> out, stats = la.sparse.xattention(3 * q, k, v, threshold=0.8, block=64, return_stats=True)
        >>> stats.density < 0.8
        True
    """
    selector = Antidiagonal(threshold=threshold, stride=stride, block=block, sink=sink, own=own)
    return sparse_attention(q, k, v, selector, causal=causal, scale=scale, **options)


METHOD = Method(
    name="xattention",
    family="sparse",
    title="XAttention: Block Sparse Attention with Antidiagonal Scoring",
    year=2025,
    arxiv="2503.16428",
    function=xattention,
    reference=reference.xattention,
    exact=False,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "With a threshold of 1 it is dense attention.",
        "With a stride of 1 the chosen blocks are the fewest with that share of the true weights.",
        "Where the rows of each stride are equal the weights are the softmax over strides.",
        "With a threshold of 0 it is attention to the own and the first block.",
        "It is dense attention with the mask that its blocks stand for.",
    ),
    tests="tests/sparse/test_xattention.py",
    cost="`Lq * Lk / stride * D` multiply-adds per query head to choose.",
    mask=lambda: seen(xattention, *example(), threshold=0.7, stride=4, block=8, causal=True),
)
