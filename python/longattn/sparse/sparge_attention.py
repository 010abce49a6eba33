"""SpargeAttention: blocks by the scores of their means, but those whose rows differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from longattn import _core
from longattn._arrays import Array
from longattn._checks import flag, real, scale_factor
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._selecting import (
    block_bounds,
    block_likeness,
    head_numbers,
    keep_integers,
    key_limits,
    listed,
    mean_row,
    per_query_head,
    selector_inputs,
)
from longattn.sparse.block_mask import BlockMask, fitted
from longattn.sparse.composed import Composable
from longattn.sparse.sparse_attention import sparse_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparge(Composable):
    """The prediction of SpargeAttention: the best key blocks by the scores of means.

    A block's mean stands for its rows where they are alike (the mean cosine of all pairs of them above `theta`). A
    query block takes the longest run of key blocks, in falling order of `softmax(scale * mean q . mean k)`, that has
    at most a share `cdf` of it, but at least one; every key block whose rows differ; and, where its own differ, all.

    Args:
        theta: rows are alike where their mean cosine is above this; a number, or `[Hq]`. From 1 on none are.
        cdf: share of the softmax over means, a number or `[Hq]`; from 1 on all blocks are taken.
        topk: instead of `cdf`, the share of the key blocks (of alike rows, before the end of the query block if
            causal), rounded up; a number or `[Hq]`.
        smooth_k: take the mean key off all keys first: it changes no softmax, but what is alike.
        sink: always take the first key block.
        block_q: queries of a block.
        block_k: keys of a block.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size below 1.
    """

    theta: Any = 0.6
    cdf: Any = 0.98
    topk: Any = None
    smooth_k: bool = True
    sink: bool = False
    block_q: int = 128
    block_k: int = 64

    def __post_init__(self) -> None:
        """Checks what does not depend on the heads."""
        flag(self.smooth_k, "smooth_k")
        flag(self.sink, "sink")
        keep_integers(self, block_q=1, block_k=1)
        head_numbers(self.theta, "theta")
        head_numbers(self.cdf, "cdf")
        if self.topk is not None:
            head_numbers(self.topk, "topk")

    def __call__(self, q: Array, k: Array, *, causal: bool = False, scale: float | None = None) -> BlockMask:
        """The mask, a list for each query head."""
        qn, kn = selector_inputs(q, k)
        causal = flag(causal, "causal")
        batch, heads, rows, dim = qn.shape
        group, keys = heads // kn.shape[1], kn.shape[2]
        theta = per_query_head(self.theta, "theta", heads)[:, None]
        by_count = self.topk is not None
        share = per_query_head(self.topk if by_count else self.cdf, "topk" if by_count else "cdf", heads)
        bounds_q, bounds_k = block_bounds(rows, self.block_q), block_bounds(keys, self.block_k)
        mean_q, like_q = block_likeness(qn, bounds_q)
        mean_k, like_k = block_likeness(kn, bounds_k, mean_row(kn) if self.smooth_k else None)
        whole = (like_q <= theta) | (theta >= 1)
        always = (np.repeat(like_k, group, axis=1) <= theta) | (theta >= 1)
        limits = -(-key_limits(bounds_q, (rows, keys), causal) // self.block_k)
        chosen = _core.pooled_blocks(
            mean_q,
            mean_k,
            scale_factor(scale, dim),
            whole.ravel(),
            always.ravel(),
            limits,
            share,
            by_count,
            int(self.sink),
        )
        shape = (batch, heads, len(bounds_q) - 1)
        return BlockMask(
            **listed(chosen, shape),  # type: ignore[arg-type]
            **fitted((rows, keys), self.block_q, self.block_k),
            scored=batch * heads * (len(bounds_q) - 1) * (len(bounds_k) - 1),
        )


def sparge_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    theta: float | Array = 0.6,
    cdf: float | Array = 0.98,
    topk: float | Array | None = None,
    smooth_k: bool = True,
    sink: bool = False,
    block_q: int = 128,
    block_k: int = 64,
    skip_log2: float = 50.0,
    causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Attention over blocks that the means of rows predict to matter, less those whose weights turn out to vanish.

    First stage: for each query block the best key blocks by `softmax(scale * mean q . mean k)`, and those whose mean
    does not stand for them because their rows differ (`longattn.sparse.Sparge`). Second stage, inside the kernel:
    what lies `skip_log2` powers of two below the row's largest weight so far adds nothing to output and lse; this is
    judged for up to 256 keys and a few rows together.

    The quantisation of queries and keys that the original offers besides is not offered over chosen blocks.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        theta: rows of a block are alike where their mean cosine is above this; a number, or `[Hq]`.
        cdf: share of the softmax over means that the chosen blocks may have, a number or `[Hq]`.
        topk: instead of `cdf`, the share of the key blocks; a number or `[Hq]`.
        smooth_k: take the mean key off all keys before means and cosines.
        sink: always take the first key block.
        block_q: queries of a block.
        block_k: keys of a block.
        skip_log2: see above; `inf` leaves out nothing in the kernel.
        causal: a query sees only keys at its own position and before.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        options: those of `sparse_attention`: `return_lse`, `return_stats`, `out`, `softcap`, `sinks`, ...

    Returns:
        The output as of `longattn.sparse_attention`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Prediction: `(Lq / block_q) * (Lk / block_k) * D` multiply-adds per query head and one pass over queries and
        keys; attention: `(D + Dv)` per query and key of the chosen blocks.

    References:
        J. Zhang et al., "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model
        Inference", 2025, arXiv:2502.18137.

    Example:
        >>> import numpy as np, longattn as la
        >>> rng = np.random.default_rng(0)
        >>> q, k = np.repeat(rng.standard_normal((2, 1, 16, 32), dtype=np.float32), 64, axis=2)
        >>> v = rng.standard_normal((1, 1024, 32), dtype=np.float32)
        >>> out, stats = la.sparse.sparge_attention(3 * q, k, v, block_q=64, return_stats=True)
        >>> stats.density < 0.9
        True
    """
    skip = real(skip_log2, "skip_log2")
    if not skip > 0:
        raise ValueError(f"skip_log2: got {skip_log2}, expected a positive number")
    selector = Sparge(theta=theta, cdf=cdf, topk=topk, smooth_k=smooth_k, sink=sink, block_q=block_q, block_k=block_k)
    # Beyond this, float32 weights have vanished anyway.
    threshold = 0.0 if skip > 126 else math.exp2(-skip)
    return sparse_attention(q, k, v, selector, causal=causal, scale=scale, skip_threshold=threshold, **options)


METHOD = Method(
    name="sparge_attention",
    family="sparse",
    title="SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference",
    year=2025,
    arxiv="2502.18137",
    function=sparge_attention,
    reference=reference.sparge_attention,
    exact=False,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "With `cdf` 1 and nothing skipped it is dense attention.",
        "With `theta` 1 every block is computed.",
        "Where the rows of each block are equal its scores are the softmax over blocks.",
        "Taking the mean key off changes no dense result.",
        "The density that is reported is the share of blocks that are kept.",
    ),
    tests="tests/sparse/test_sparge_attention.py",
    cost="`(Lq / block_q) (Lk / block_k) D` multiply-adds per query head to predict, one pass over queries and keys.",
    mask=lambda: seen(sparge_attention, *example(), theta=0.3, cdf=0.9, sink=True, block_q=8, block_k=8, causal=True),
)
