"""AnchorAttention: keys whose pooled score comes near an anchor, chosen one by one for a group of query blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, like
from longattn._checks import batched, dense_inputs, flag, one_of, real, result_array, returned, scale_factor
from longattn.dense._options import Options
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._lists import from_flat
from longattn.sparse._selecting import block_bounds, block_means, keep_integers, listed, only_causal, selector_inputs
from longattn.sparse.composed import Composable
from longattn.sparse.row_lists import RowLists
from longattn.sparse.sparse_attention import SparseStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor(Composable):
    """The lists of AnchorAttention: for each group of query blocks, the anchor's keys and those that come near it.

    A group is `step` blocks of `block` queries. Its anchor's keys are the first `init_blocks` blocks and those from
    the group's first position on. Of the keys between, key `j` is chosen if for some block of the group
    `scale * mean q . k_j + theta` reaches the mean, over the block's queries, of their largest logit of the anchor.

    Args:
        block: queries of a block, and keys of an initial one.
        step: blocks of a group.
        theta: how far below the anchor a key may lie, in units of the logits (natural logarithm).
        init_blocks: blocks at the beginning that belong to every anchor.
        group_reduce: `None` makes a list for each query head, "any" one for the query heads of a KV head, with what any
            of them chooses.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size below 1 (`init_blocks` below 0), NaN, another `group_reduce`.
    """

    block: int = 128
    step: int = 16
    theta: float = 12.0
    init_blocks: int = 1
    group_reduce: str | None = None

    def __post_init__(self) -> None:
        """Checks the sizes."""
        keep_integers(self, block=1, step=1, init_blocks=0)
        real(self.theta, "theta")
        one_of(self.group_reduce, "group_reduce", ("any", None))

    def __call__(self, q: Array, k: Array, *, causal: bool = True, scale: float | None = None) -> RowLists:
        """Anchors and chosen keys together; attention to the anchor is computed for its largest logits."""
        only_causal(causal)
        qn, kn = selector_inputs(q, k)
        factor = scale_factor(scale, qn.shape[3])
        *_, largest = self.attend_to_anchor(qn, kn, kn[..., :1], factor)
        chosen = self.stripes(qn, kn, largest, factor)
        anchor = self.anchor(qn, kn)
        each = RowLists(
            indptr=_repeated(anchor, chosen.shape),
            indices=np.tile(anchor.indices, chosen.shape[0] * chosen.shape[1]),
            lengths=anchor.lengths,
            block_q=anchor.block_q,
        )
        return chosen | each

    def anchor(self, q: NDArray[Any], k: NDArray[Any]) -> RowLists:
        """Keys of each group's anchor, which causality cuts."""
        _, starts, ends, firsts = self._groups(q, k)
        lists = [
            np.union1d(np.arange(first), np.arange(start, end))
            for start, end, first in zip(starts, ends, firsts, strict=True)
        ]
        flat = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
        return RowLists(
            indptr=from_flat(flat, (1, 1, len(lists))),
            indices=np.concatenate([np.zeros(0, np.int64), *lists]),
            lengths=(q.shape[2], k.shape[2]),
            block_q=self._rows(self.step),
        )

    def attend_to_anchor(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], scale: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Output, lse and largest logit of attention to the anchor."""
        anchor = self.anchor(q, k)
        out = np.zeros((*q.shape[:3], v.shape[3]), np.float32)
        lse, largest = (np.full(q.shape[:3], -np.inf, np.float32) for _ in range(2))
        if lse.size:
            options: Options = {"scale": scale, "causal": True}
            _core.index_sparse(q, k, v, out, lse, anchor._for_kernel(), None, largest, options)
        return out, lse, largest

    def stripes(self, q: NDArray[Any], k: NDArray[Any], largest: NDArray[np.float32], scale: float) -> RowLists:
        """Keys outside the anchor that come near it."""
        batch, heads, rows, _ = q.shape
        bounds, starts, _, firsts = self._groups(q, k)
        means = block_means(q, bounds)
        weights = block_means(np.ascontiguousarray(largest[..., None]), bounds)[..., 0]
        with np.errstate(invalid="ignore"):
            thresholds = weights - np.float32(self.theta)
        shared = self.group_reduce == "any"
        own = k.shape[1] if shared else heads
        shape = (batch, own, len(starts))
        # A group's first position may lie before the first key.
        chosen = _core.stripes(
            means, k, scale, thresholds.ravel(), self.step, firsts, np.maximum(starts, firsts), shared
        )
        return RowLists(
            **listed(chosen, shape),  # type: ignore[arg-type]
            lengths=(rows, k.shape[2]),
            block_q=self._rows(self.step),
            scored=batch * heads * int(((starts - firsts) * self._blocks_per_group(rows)).sum()),
        )

    def _rows(self, blocks: int) -> int:
        """Rows of some blocks, as far as 64 bits count."""
        return min(blocks * self.block, 2**62)

    def _blocks_per_group(self, rows: int) -> NDArray[np.int64]:
        blocks = -(-rows // self.block)
        return np.diff(block_bounds(blocks, self.step))

    def _groups(
        self, q: NDArray[Any], k: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Bounds of query blocks; first and last positions of groups, and ends of their initial keys."""
        rows, keys = q.shape[2], k.shape[2]
        bounds = block_bounds(rows, self._rows(self.step)) + (keys - rows)
        starts, ends = np.clip(bounds[:-1], 0, keys), np.clip(bounds[1:], 0, keys)
        return block_bounds(rows, self.block), starts, ends, np.minimum(starts, self._rows(self.init_blocks))


def _repeated(lists: RowLists, shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """`indptr` of one list for all, once for each batch and head of `shape`."""
    heads = np.arange(shape[0] * shape[1]).reshape(shape[0], shape[1], 1)
    repeated: NDArray[np.int64] = lists.indptr + heads * lists.indices.size
    return repeated


def anchor_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block: int = 128,
    step: int = 16,
    theta: float = 12.0,
    init_blocks: int = 1,
    group_reduce: str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    out: Array | None = None,
) -> Any:
    """Causal attention to an anchor, and to the single keys whose pooled score comes near the anchor's largest.

    Queries go in groups of `step` blocks. Each query attends to its anchor (the first `init_blocks` blocks of keys, and
    those from its group's first position to its own); its largest logit there stands for the largest of all. Of the
    keys between, a group attends to those for which `scale * mean q . k_j + theta` reaches, for one of its blocks, the
    mean of these largest logits. The second part continues the softmax of the first.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, those of the last `Lq` keys.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        block: queries of a block, and keys of an initial one.
        step: blocks of a group.
        theta: how far below the anchor a key may lie, in units of the logits (natural logarithm).
        init_blocks: blocks at the beginning that belong to every anchor.
        group_reduce: `None` makes a list for each query head, "any" one for the query heads of a KV head, with what any
            of them chooses.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp of the logits.
        return_stats: also return `SparseStats`, of anchor and chosen keys together.
        out: array `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) of the kind and dtype of `q` that receives the result.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; a tuple with the lse, float32
        `[B, Hq, Lq]`, and the statistics after it, in this order, where they were asked for.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Choosing: `(Lq / block) * Lk / 2 * D` multiply-adds per query head. Attention: `Lq * (init_blocks * block +
        step * block / 2 + chosen keys) * (D + Dv)`.

    References:
        "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity", 2025, arXiv:2505.23520.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 400, 16), dtype=np.float32)
        >>> out = la.sparse.anchor_attention(q, k, v, block=16, step=4, theta=float("inf"))
        >>> np.allclose(out, la.attention(q, k, v, causal=True), atol=1e-5)
        True
    """
    selector = Anchor(block=block, step=step, theta=theta, init_blocks=init_blocks, group_reduce=group_reduce)
    return_lse, return_stats = flag(return_lse, "return_lse"), flag(return_stats, "return_stats")
    q3, k3, v3 = dense_inputs(q, k, v)
    qn, kn = selector_inputs(q3, k3)
    vn, factor = batched(v3, 4), scale_factor(scale, qn.shape[3])
    shape = (*q3.shape[:-1], v3.shape[-1])
    result = result_array(out, q, shape, q3.dtype, {} if out is None else {"q": qn, "k": kn, "v": vn})
    state = selector.attend_to_anchor(qn, kn, vn, factor)
    chosen = selector.stripes(qn, kn, state[2], factor)
    lse = np.empty(qn.shape[:3], np.float32)
    if lse.size:
        options: Options = {"scale": factor, "state": state[:2]}
        _core.index_sparse(qn, kn, vn, batched(result, 4), lse, chosen._for_kernel(), None, None, options)
    given = returned(out, q, result, lse.reshape(shape[:-1]) if return_lse else None)
    if not return_stats:
        return given
    stats = _stats(selector.anchor(qn, kn), chosen)
    return (*given, stats) if return_lse else (like(q, result) if out is None else out, stats)


def _stats(anchor: RowLists, chosen: RowLists) -> SparseStats:
    """Of both parts; the anchor is the same for every head."""
    batch, heads, _ = chosen.shape
    attended = batch * heads * anchor.pairs(causal=True) + chosen.pairs()
    density = anchor.density(causal=True)
    pairs = anchor.pairs(causal=True)
    share = density * attended / (batch * heads * pairs) if pairs else 0.0
    return SparseStats(scored=chosen.scored, attended=attended, density=share, nbytes=anchor.nbytes + chosen.nbytes)


METHOD = Method(
    name="anchor_attention",
    family="sparse",
    title="AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity",
    year=2025,
    arxiv="2505.23520",
    function=anchor_attention,
    reference=reference.anchor_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "With `theta` infinite it is causal attention.",
        "With `theta` minus infinity it is attention to the anchor.",
        "With a single group it is causal attention.",
        "The result does not depend on where long lists are cut.",
        "No key is used twice.",
    ),
    tests="tests/sparse/test_anchor_attention.py",
    cost="`(Lq / block) * Lk / 2 * D` multiply-adds per query head to choose, and attention to anchor and chosen keys.",
    mask=lambda: seen(anchor_attention, *example(), block=8, step=2, theta=6.0),
)
