"""SALE: blocks by 4-bit estimates of single scores, relative to what sinks and near keys weigh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array
from longattn._checks import scale_factor
from longattn.methods import Method
from longattn.pictures import causally, example
from longattn.reference import sparse as reference
from longattn.sparse._lists import from_flat
from longattn.sparse._selecting import (
    aligned_first,
    block_bounds,
    head_numbers,
    keep_integers,
    key_limits,
    listed,
    mean_row,
    only_causal,
    per_query_head,
    selector_inputs,
)
from longattn.sparse.block_mask import BlockMask, fitted
from longattn.sparse.block_sparse_attention import block_sparse_attention
from longattn.sparse.composed import Composable

#: Below this a threshold keeps every block.
_DENSE_TAU = 1e-5
#: Largest magnitude of a 4-bit code.
_LEVELS = 7.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sale(Composable):
    """The mask of SALE, as a selector; see `sale_select` for the method.

    Args:
        tau: relative attention that keeps a block, a number or `[Hq]`.
        block_q: queries of a block.
        block_k: keys of a block.
        local_window: keys before a query block that are always kept, at least.
        segment: the keys that are judged are a multiple of this; a multiple of `block_k`.
        min_length: with no more queries every block is kept.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size below 1, or a segment that is no multiple of `block_k`.
    """

    tau: Any = 0.004
    block_q: int = 64
    block_k: int = 32
    local_window: int = 128
    segment: int = 256
    min_length: int = 1024

    def __post_init__(self) -> None:
        """Checks the sizes."""
        keep_integers(self, block_q=1, block_k=1, segment=1, local_window=0, min_length=0)
        head_numbers(self.tau, "tau")
        if self.segment % self.block_k:
            raise ValueError(f"segment: got {self.segment}, expected a multiple of block_k, {self.block_k}")

    def __call__(self, q: Array, k: Array, *, causal: bool = True, scale: float | None = None) -> BlockMask:
        """The mask, a list for each query head."""
        only_causal(causal)
        qn, kn = selector_inputs(q, k)
        batch, heads, rows, dim = qn.shape
        keys, factor = kn.shape[2], scale_factor(scale, dim)
        tau = per_query_head(self.tau, "tau", heads)
        if (tau < 0).any():
            raise ValueError(f"tau: got {float(tau.min())}, expected no negative numbers")
        first = aligned_first((rows, keys), self.block_q)
        bounds = block_bounds(rows, self.block_q, first)
        limits = -(-key_limits(bounds, (rows, keys), True) // self.block_k)
        starts = bounds[:-1] + (keys - rows)
        judged = np.maximum(starts - self.local_window - self.block_k, 0) // self.segment * self.segment
        shape = (batch, heads, len(limits))
        begin = np.minimum(1, limits)
        end = np.minimum(begin + judged // self.block_k, limits)
        sizes = fitted((rows, keys), self.block_q, self.block_k, first)
        if rows <= self.min_length or (tau < _DENSE_TAU).all():
            return _whole(limits, shape, sizes)
        anchor = _ranges(begin, end, limits, sizes)
        _, lse = block_sparse_attention(qn, kn, kn[..., :1], anchor, causal=True, scale=factor, return_lse=True)
        with np.errstate(divide="ignore"):
            margin = np.where(tau < _DENSE_TAU, -np.inf, np.log(tau)).astype(np.float32)
        with np.errstate(invalid="ignore"):
            thresholds = np.nan_to_num(lse + margin[:, None], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        chosen = _core.rounded_blocks(
            qn,
            kn,
            factor,
            bounds,
            self.block_k,
            (begin, end),
            limits,
            thresholds.ravel(),
            mean_row(qn).ravel(),
            _LEVELS,
        )
        scored = batch * heads * int((np.diff(bounds) * judged).sum())
        return BlockMask(**listed(chosen, shape), **sizes, scored=scored)  # type: ignore[arg-type]


def sale_select(
    q: Array,
    k: Array,
    *,
    tau: float | Array = 0.004,
    block_q: int = 64,
    block_k: int = 32,
    local_window: int = 128,
    segment: int = 256,
    min_length: int = 1024,
    scale: float | None = None,
) -> BlockMask:
    """The blocks of keys that SALE keeps for causal attention of a prefill.

    Each query block keeps the first block of keys, its own, and at least the `local_window` keys before. Exact
    attention to those gives every query its log-sum-exp. A block in between is kept if some query of the query block
    and some key of it have an estimated weight `exp(logit - lse)` of at least `tau`. (The largest logit and the sum of
    the softmax are those of sinks and near keys throughout; kept blocks do not change them.)

    Estimates are from queries and keys rounded to whole numbers from -7 to 7 times a scale per row, after means are
    taken off: with `q = q' + m` and `k = k' + c`, `q . k ~ q'4 . k'4 + m . k' + q . c`, the last two exactly.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, those of the last `Lq` keys.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes; rounded once per KV head.
        tau: weight relative to sinks and near keys that keeps a block, a number or `[Hq]` (by calibration); below
            1e-5 a head keeps every block.
        block_q: queries of a block.
        block_k: keys of a block.
        local_window: keys before a query block that are always kept, at least.
        segment: the keys that are judged are a multiple of this, a multiple of `block_k`; what is left over counts
            as near.
        min_length: with no more queries every block is kept.
        scale: factor on the dot products; `None` is `D ** -0.5`.

    Returns:
        The mask, a list for each query head, for `longattn.block_sparse_attention` with `causal`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Lq * Lk / 2 * D` products of bytes per query head where the CPU multiplies bytes (AVX-512 VNNI), of floats
        elsewhere; attention to sinks and near keys; the rounded keys, a byte per number.

    References:
        X. Ji et al., "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling", 2025,
        arXiv:2505.24179.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 2048, 16), dtype=np.float32)
        >>> mask = la.sparse.sale_select(q, k, tau=0.05)
        >>> out = la.block_sparse_attention(q, k, v, mask, causal=True)
        >>> mask.density(causal=True) < 0.9
        True
    """
    selector = Sale(
        tau=tau, block_q=block_q, block_k=block_k, local_window=local_window, segment=segment, min_length=min_length
    )
    return selector(q, k, scale=scale)


def _whole(limits: NDArray[np.int64], shape: tuple[int, int, int], sizes: dict[str, Any]) -> BlockMask:
    """Every block that may be seen."""
    one = [np.arange(limit) for limit in limits]
    repeats = shape[0] * shape[1]
    flat = np.concatenate([[0], np.cumsum(np.tile(limits, repeats))])
    indices = np.tile(np.concatenate([np.zeros(0, np.int64), *one]), repeats)
    return BlockMask(indptr=from_flat(flat, shape), indices=indices, **sizes)


def _ranges(
    begin: NDArray[np.int64], end: NDArray[np.int64], limits: NDArray[np.int64], sizes: dict[str, Any]
) -> BlockMask:
    """What is kept without being judged, one list for all heads."""
    lists = [
        np.concatenate([np.arange(b), np.arange(e, limit)]) for b, e, limit in zip(begin, end, limits, strict=True)
    ]
    flat = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
    indices = np.concatenate([np.zeros(0, np.int64), *lists])
    return BlockMask(indptr=from_flat(flat, (1, 1, len(lists))), indices=indices, **sizes)


METHOD = Method(
    name="sale_select",
    family="sparse",
    title="SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling",
    year=2025,
    arxiv="2505.24179",
    function=sale_select,
    reference=reference.sale_select,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "With `tau` 0 it keeps every block: causal attention.",
        "With `tau` infinite it keeps sinks and near keys.",
        "Where estimates are farther from the threshold than from the logits, blocks are those of exact logits.",
        "Means that are taken off change no logit.",
    ),
    tests="tests/sparse/test_sale_select.py",
    cost="`Lq * Lk / 2 * D` products of bytes per query head, and attention to sinks and near keys.",
    mask=lambda: causally(
        sale_select(*example(), block_q=8, block_k=8, local_window=8, segment=8, min_length=8).to_dense_mask()
    ),
)
