"""DHSA: keys of the best chunks, whose lengths differ, for each block of queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, flag, integer, real
from longattn.methods import Method
from longattn.pictures import causally, example
from longattn.reference import sparse as reference
from longattn.sparse._lists import from_flat
from longattn.sparse._selecting import (
    block_bounds,
    block_means,
    keep_integers,
    key_limits,
    only_causal,
    selector_inputs,
)
from longattn.sparse.composed import Composable
from longattn.sparse.row_lists import RowLists


@dataclass(frozen=True, slots=True, kw_only=True)
class Dhsa(Composable):
    """The lists of DHSA, as a selector; see `dhsa_select` for the method.

    Args:
        budget: keys of a list.
        boundaries: keys of a chunk, or where chunks begin, and the number of keys.
        block_q: queries of a block.
        n_local: last keys before the end of the query block that are always listed.
        n_global: first keys that are always listed.
        instruction_tokens: last queries that see everything.
        per_head: whether each query head has lists of its own.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size below 1 (0 for counts that may be none).
    """

    budget: int
    boundaries: Any = 64
    block_q: int = 64
    n_local: int = 128
    n_global: int = 128
    instruction_tokens: int = 64
    per_head: bool = False

    def __post_init__(self) -> None:
        """Checks the sizes."""
        keep_integers(self, budget=1, block_q=1, n_local=0, n_global=0, instruction_tokens=0)
        flag(self.per_head, "per_head")

    def __call__(self, q: Array, k: Array, *, causal: bool = True, scale: float | None = None) -> RowLists:
        """The lists; the scale does not change which chunks are best."""
        del scale
        only_causal(causal)
        qn, kn = selector_inputs(q, k)
        lengths = (qn.shape[2], kn.shape[2])
        bounds_q, bounds_k = block_bounds(lengths[0], self.block_q), chunk_bounds(self.boundaries, lengths[1])
        pooled_q, pooled_k = chunk_means(qn, bounds_q), chunk_means(kn, bounds_k)
        if not self.per_head:
            pooled_q, pooled_k = (x.mean(axis=1, keepdims=True) for x in (pooled_q, pooled_k))
        limits = key_limits(bounds_q, lengths, True)
        flat, indices = _core.chunk_keys(pooled_q, pooled_k, bounds_k, limits, self.budget, self.n_global, self.n_local)
        shape = (*pooled_q.shape[:2], len(limits))
        lists = RowLists(
            indptr=from_flat(flat, shape),
            indices=indices,
            lengths=lengths,
            block_q=self.block_q,
            scored=pooled_q.shape[0] * pooled_q.shape[1] * len(limits) * (len(bounds_k) - 1),
        )
        return lists if not self.instruction_tokens else _with_whole_rows(lists, limits, self.instruction_tokens)


def dhsa_select(
    q: Array,
    k: Array,
    *,
    budget: int,
    boundaries: int | Array = 64,
    block_q: int = 64,
    n_local: int = 128,
    n_global: int = 128,
    instruction_tokens: int = 64,
    per_head: bool = False,
) -> RowLists:
    """The keys that each block of queries attends to by DHSA: those of the chunks with the best scores.

    A chunk of keys is represented by `sum of its keys / sqrt(its length)`, a block of queries likewise, and scored by
    their product. A block of queries lists its last `n_local` keys (before its own end) and the first `n_global`, and
    then keys in falling order of their chunk's score, lower keys first, until there are `budget`; all of it before the
    end of the block. Attention over the lists is causal.

    Blocks of queries that hold any of the last `instruction_tokens` queries list every key.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, those of the last `Lq` keys.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        budget: keys of a list, those that are always listed included.
        boundaries: keys of a chunk; or integers that rise from 0 to `Lk`, where chunks begin and the last one ends
            (`pick_boundaries` gives such).
        block_q: queries of a block.
        n_local: last keys before the end of the query block that are always listed.
        n_global: first keys that are always listed.
        instruction_tokens: last queries that see everything.
        per_head: whether each query head has lists of its own; else means over heads make one for all.

    Returns:
        The lists, for `longattn.index_sparse_attention` with `causal`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        One pass over queries and keys, and `(Lq / block_q) * chunks * D` multiply-adds. Attention over the lists:
        `Lq * budget * (D + Dv)` per query head.

    References:
        S. Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs", 2025,
        arXiv:2510.24606.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 1000, 16), dtype=np.float32)
        >>> lists = la.sparse.dhsa_select(q, k, budget=300)
        >>> out = la.index_sparse_attention(q, k, v, lists, causal=True)
        >>> lists.density(causal=True) < 0.7
        True
    """
    selector = Dhsa(
        budget=budget,
        boundaries=boundaries,
        block_q=block_q,
        n_local=n_local,
        n_global=n_global,
        instruction_tokens=instruction_tokens,
        per_head=per_head,
    )
    return selector(q, k)


def chunk_bounds(boundaries: int | Array, keys: int) -> NDArray[np.int64]:
    """Where chunks begin, and the number of keys."""
    if isinstance(boundaries, int | np.integer):
        return block_bounds(keys, integer(boundaries, "boundaries", 1))
    x = as_numpy(boundaries, "boundaries")
    if x.dtype.kind not in "iu":
        raise TypeError(f"boundaries: got dtype {x.dtype}, expected integers")
    if x.ndim != 1 or not x.size or x[0] != 0 or x[-1] != keys or (np.diff(x.astype(np.int64)) <= 0).any():
        raise ValueError(f"boundaries: got an array {x.shape}, expected numbers that rise from 0 to {keys}")
    return x.astype(np.int64)


def chunk_means(x: NDArray[Any], bounds: NDArray[np.int64]) -> NDArray[np.float32]:
    """Sums of rows over the square root of their number, `[B, H, chunks, D]`."""
    roots = np.sqrt(np.diff(bounds)).astype(np.float32)
    return np.ascontiguousarray(block_means(x, bounds) * roots[:, None])


def _with_whole_rows(lists: RowLists, limits: NDArray[np.int64], last: int) -> RowLists:
    """Every key that may be seen, in the blocks that hold one of the last queries."""
    batch, heads, blocks = lists.shape
    whole = lists.query_bounds[1:] > lists.lengths[0] - last
    sizes = np.diff(lists._flat()).reshape(batch * heads, blocks)
    sizes = np.where(whole, limits, sizes)
    flat = np.concatenate([[0], np.cumsum(sizes.ravel())])
    parts: list[NDArray[Any]] = []
    every = [np.arange(limit) for limit in limits[whole]]
    old = lists._flat()
    for head in range(batch * heads):
        kept = int(blocks - whole.sum())
        parts.append(lists.indices[old[head * blocks] : old[head * blocks + kept]])
        parts.extend(every)
    return RowLists(
        indptr=from_flat(flat, lists.shape),
        indices=np.concatenate([np.zeros(0, np.uint32), *parts]).astype(np.uint32),
        lengths=lists.lengths,
        block_q=lists.block_q,
        scored=lists.scored,
    )


def boundary_logits(keys: Array, weights: Mapping[str, Array], *, window: int = 4) -> NDArray[np.float32]:
    """How likely each gap between two tokens is a boundary of chunks, by the learned predictor.

    Both sides of a gap, `window` keys each, go through the same encoder, `relu(pointwise @ sum_t depthwise[t] * k_t +
    pointwise_bias)`, to `l` and `r` of width `E`; `[l, r, |l - r|, l * r, cos(l, r)]` through
    `output . relu(hidden @ . + hidden_bias) + output_bias`. Keys before the first and after the last count as zeros.
    (Layers of this kind are the paper's; where they have their nonlinearity is our reading.)

    Args:
        keys: keys, or other features of tokens, `[Lk, D]`; the mean over heads of a layer's keys.
        weights: arrays `depthwise` `[window, D]`, `pointwise` `[E, D]`, `pointwise_bias` `[E]`, `hidden`
            `[H, 4 E + 1]`, `hidden_bias` `[H]`, `output` `[H]`, `output_bias` (a number). On the left side the key
            next to the gap meets the last row of `depthwise`, on the right side the first.
        window: keys on each side.

    Returns:
        Logits `[Lk - 1]`, float32; number `j` is that of the gap between tokens `j` and `j + 1`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        `Lk * (window * D + 2 E D + H (4 E + 1))` multiply-adds, by matrix products.
    """
    window = integer(window, "window", 1)
    x = as_numpy(keys, "keys")
    check_floating(x, "keys")
    if x.ndim != 2 or not x.size:
        raise ValueError(f"keys: got shape {x.shape}, expected [Lk, D]")
    length, dim = x.shape
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: got {type(weights).__name__}, expected arrays by name")
    w = {name: as_numpy(value, f"weights[{name!r}]").astype(np.float32) for name, value in weights.items()}
    wide = w["pointwise"].shape[0] if "pointwise" in w and w["pointwise"].ndim == 2 else 0
    hidden = w["hidden"].shape[0] if "hidden" in w and w["hidden"].ndim == 2 else 0
    shapes = {
        "depthwise": (window, dim),
        "pointwise": (wide, dim),
        "pointwise_bias": (wide,),
        "hidden": (hidden, 4 * wide + 1),
        "hidden_bias": (hidden,),
        "output": (hidden,),
        "output_bias": (),
    }
    for name, shape in shapes.items():
        if name not in w:
            raise ValueError(f"weights: got {sorted(w)}, expected {name!r} among them")
        if w[name].shape != shape:
            raise ValueError(f"weights[{name!r}]: got shape {w[name].shape}, expected {shape}")
    padded = np.zeros((length + 2 * window, dim), np.float32)
    padded[window:-window] = x
    # Windows that begin `window` keys before token j.
    mixed = sum(padded[t : t + length + window + 1] * w["depthwise"][t] for t in range(window))
    encoded = np.maximum(mixed @ w["pointwise"].T + w["pointwise_bias"], 0)
    left, right = encoded[1:length], encoded[1 + window : length + window]
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosine = np.divide((left * right).sum(axis=1), norms, out=np.zeros_like(norms), where=norms > 0)
    features = np.concatenate([left, right, np.abs(left - right), left * right, cosine[:, None]], axis=1)
    logits: NDArray[np.float32] = (
        np.maximum(features @ w["hidden"].T + w["hidden_bias"], 0) @ w["output"] + w["output_bias"]
    )
    return logits.astype(np.float32)


def pick_boundaries(
    scores: Array, n_chunks: int, *, half_width: int = 8, threshold: float = -np.inf
) -> NDArray[np.int64]:
    """The best gaps as boundaries of chunks, none within `half_width` of a better one.

    Args:
        scores: a number for each gap, `[Lk - 1]`, as of `boundary_logits` or `boundary_ratios`.
        n_chunks: the most chunks.
        half_width: gaps on both sides of a picked one that are out.
        threshold: only gaps above it are picked.

    Returns:
        Boundaries, rising from 0 to `Lk`, int64.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: another shape, no chunks.

    Cost:
        One sort.

    Example:
        >>> import numpy as np, longattn as la
        >>> la.sparse.pick_boundaries(np.array([0.0, 5.0, 4.0, 0.0, 3.0]), 3, half_width=1)
        array([0, 2, 5, 6])
    """
    x = as_numpy(scores, "scores")
    check_floating(x, "scores")
    if x.ndim != 1:
        raise ValueError(f"scores: got shape {x.shape}, expected [Lk - 1]")
    n_chunks, half_width = integer(n_chunks, "n_chunks", 1), integer(half_width, "half_width", 0)
    bar = real(threshold, "threshold")
    out = ~(x > bar)  # NaN, too
    picked: list[int] = []
    for gap in np.argsort(-np.where(out, -np.inf, x), kind="stable"):
        if len(picked) == n_chunks - 1:
            break
        if not out[gap]:
            picked.append(int(gap) + 1)
            out[max(0, gap - half_width) : gap + half_width + 1] = True
    return np.array([0, *sorted(picked), len(x) + 1], np.int64)


def boundary_ratios(attention: Array, *, window: int = 4, eps: float = 1e-6) -> NDArray[np.float64]:
    """How much later queries tell the two sides of each gap apart: what the predictor is trained on.

    Gap `j` (between tokens `j` and `j + 1`) has `past`, the weight that the queries after `j + window` give to keys
    `j - window + 1` to `j`, and `future`, what they give to keys `j + 1` to `j + window`; the result is
    `(max + eps) / (min + eps)` of both. Gaps of ratio above 1.1 are candidates of `pick_boundaries`.

    Args:
        attention: softmax weights, the mean over heads, `[L, L]`.
        window: keys on each side.
        eps: keeps quotients of nothing near 1. (The paper's value is not known to us.)

    Returns:
        Ratios `[L - 1]`, float64.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: another shape.

    Cost:
        A cumulative sum over the weights.
    """
    window, small = integer(window, "window", 1), real(eps, "eps")
    a = as_numpy(attention, "attention")
    check_floating(a, "attention")
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"attention: got shape {a.shape}, expected [L, L]")
    length = a.shape[0]
    # below[i, j]: what queries from i on give to keys before j.
    below = np.zeros((length + 1, length + 1))
    below[:-1, 1:] = np.cumsum(np.cumsum(a[::-1].astype(np.float64), axis=0)[::-1], axis=1)
    gap = np.arange(max(length - 1, 0))
    first = np.minimum(gap + window + 1, length)
    middle = gap + 1
    past = below[first, middle] - below[first, np.maximum(middle - window, 0)]
    future = below[first, np.minimum(middle + window, length)] - below[first, middle]
    ratios: NDArray[np.float64] = (np.maximum(past, future) + small) / (np.minimum(past, future) + small)
    return ratios


METHOD = Method(
    name="dhsa_select",
    family="sparse",
    title="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
    year=2025,
    arxiv="2510.24606",
    function=dhsa_select,
    reference=reference.dhsa_select,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "With a budget of all keys it is causal attention.",
        "Chunks and blocks of one token give the keys of the largest logits.",
        "Chunks of one length are ranked as by their mean keys.",
        "Pooling by prefix sums is pooling chunk by chunk.",
    ),
    tests="tests/sparse/test_dhsa_select.py",
    cost="One pass over queries and keys, `(Lq / block_q) * chunks * D` multiply-adds.",
    mask=lambda: causally(
        dhsa_select(
            *example(), budget=48, boundaries=8, block_q=8, n_local=8, n_global=8, instruction_tokens=8
        ).to_dense_mask()
    ),
)
