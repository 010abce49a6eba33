"""HyperAttention: blocks of rows whose hashes are alike, and a uniform sample of everything else."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array
from longattn._checks import batched, dense_inputs, flag, integer, one_of, result_array, returned, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._lists import from_flat
from longattn.sparse._selecting import selector_inputs
from longattn.sparse.index_sparse_attention import index_sparse_attention
from longattn.sparse.row_lists import RowLists

#: What one part of the keys gave: output and lse.
_Part = tuple[NDArray[Any], NDArray[np.float32]]
#: The most projections of a hash.
_MOST_PROJECTIONS = 16


class _Sampler:
    """Hash directions and random samples of one call, drawn in the order in which they are asked for."""

    def __init__(
        self, dim: int, block_size: int, sample_size: int, projections: int, min_seq_len: int, order: str, seed: int
    ) -> None:
        self.block_size, self.sample_size, self.min_seq_len = block_size, sample_size, min_seq_len
        self.gray = order == "reference"
        self.random = np.random.default_rng(seed)
        self.directions = self.random.standard_normal((projections, dim), np.float32).ravel()

    def hashed(self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], scale: float) -> _Part:
        """Every query sees every key: own block in hash order, and the sample."""
        batch, heads, rows, _ = q.shape
        kv_heads, keys = k.shape[1:3]
        order_q, order_k = (_core.hash_order(x, self.directions, self.gray) for x in (q, k))
        blocks = -(-keys // self.block_size)
        count = self.sample_size if blocks > 1 else 0
        samples = self.random.integers(0, keys, (batch * kv_heads, count), dtype=np.uint32)
        (flat, indices), weights = _core.hash_lists(order_k, batch * kv_heads, self.block_size, samples.ravel(), True)
        of_queries = max(1, -(-rows // blocks))
        used = -(-rows // of_queries)
        indptr = from_flat(flat, (batch, kv_heads, blocks))
        if used < blocks:  # the last blocks of keys have no queries
            indptr, indices, weights = _first_blocks(indptr, indices, weights, used)
        lists = RowLists(indptr=indptr, indices=indices, bias=weights, lengths=(rows, keys), block_q=of_queries)
        places = order_q.reshape(batch, heads, rows).astype(np.int64)
        ordered = np.take_along_axis(q, places[..., None], axis=2)
        out, lse = index_sparse_attention(ordered, k, v, lists, scale=scale, return_lse=True)
        back_out, back_lse = np.empty_like(out), np.empty_like(lse)
        np.put_along_axis(back_out, places[..., None], out, axis=2)
        np.put_along_axis(back_lse, places, lse, axis=2)
        return back_out, back_lse

    def square(self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], scale: float) -> _Part:
        """Every query sees every key, exactly where queries are few."""
        if q.shape[2] < self.min_seq_len:
            part: _Part = attention(q, k, v, scale=scale, return_lse=True)
            return part
        return self.hashed(q, k, v, scale)

    def causal(self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], scale: float) -> _Part:
        """As many queries as keys, each sees the keys up to its own: two such halves and a square."""
        length = q.shape[2]
        if length <= self.min_seq_len:
            part: _Part = attention(q, k, v, scale=scale, causal=True, return_lse=True)
            return part
        half = length // 2
        early, late = np.s_[:, :, :half], np.s_[:, :, half:]
        first = self.causal(q[early], k[early], v[early], scale)
        second = self.causal(q[late], k[late], v[late], scale)
        both = _merged(second, self.square(q[late], k[early], v[early], scale))
        return np.concatenate([first[0], both[0]], axis=2), np.concatenate([first[1], both[1]], axis=2)


def _merged(a: _Part, b: _Part) -> _Part:
    """Attention over the keys of both parts."""
    out, lse = np.empty_like(a[0]), np.empty_like(a[1])
    _core.merge([a[0], b[0]], [a[1], b[1]], out, lse)
    return out, lse


def _first_blocks(
    indptr: NDArray[np.int64], indices: NDArray[np.uint32], weights: NDArray[np.float32], blocks: int
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]:
    """Only the first lists of each head."""
    starts, ends = indptr[..., 0].ravel(), indptr[..., blocks].ravel()
    kept = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    before = np.concatenate([[0], np.cumsum(ends - starts)[:-1]]).reshape(indptr.shape[:2])
    moved = indptr[..., : blocks + 1] - indptr[..., :1] + before[..., None]
    return moved, indices[kept], weights[kept]


def hyper_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    block_size: int = 256,
    sample_size: int = 256,
    lsh_num_projs: int = 7,
    min_seq_len: int = 4096,
    order: str = "inverse_gray",
    seed: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Attention estimated from blocks of alike hashes and from a uniform sample, in nearly linear time.

    Queries and keys are sorted by the signs of `lsh_num_projs` random projections, so that neighbours differ in few,
    and cut into as many blocks. A query attends exactly to the block of keys at its own place; all others are
    represented by `sample_size` keys, drawn uniformly with replacement, common to all queries. Samples inside the own
    block do not count, which leaves the estimate of the sum of `e^logit`, hence `exp(lse)`, without bias.

    With `causal` the queries are halved again and again: the halves attend to themselves (exactly once they are no
    longer than `min_seq_len`), the later half to all keys of the earlier one by the method above. Keys before the first
    query are one more such square.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes. Hashed, and sampled, once per KV head.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        causal: a query sees only keys at its own position and before; the last query is at the last key.
        block_size: keys of a block.
        sample_size: samples, 0 for none: then only the own block counts.
        lsh_num_projs: bits of a hash, at most 16.
        min_seq_len: with no more queries attention is exact; within the halves of `causal`, squares with fewer are.
        order: "inverse_gray" sorts hashes so that neighbours differ in one bit; "reference" by the Gray code, as the
            public code of the paper does (neighbours differ in up to four).
        seed: of directions and samples.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_lse: also return the estimated log-sum-exp.
        out: array `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) of the kind and dtype of `q` that receives the result.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; with `return_lse` the pair with
        the lse, float32 `[B, Hq, Lq]`. The same bits for a seed, whatever the number of threads.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or `causal` with more queries than keys.

    Cost:
        `Lq * (block_size + sample_size) * (D + Dv)` multiply-adds per query head, `lsh_num_projs * D` per row for
        hashes; with `causal` times `log2(Lq / min_seq_len)`, and exact leaves. Queries are copied into hash order.

    References:
        I. Han et al., "HyperAttention: Long-context Attention in Near-Linear Time", 2023, arXiv:2310.05869.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5000, 16), dtype=np.float32)
        >>> out, lse = la.sparse.hyper_attention(q, k, v, return_lse=True)
        >>> _, exact = la.attention(q, k, v, return_lse=True)
        >>> float(np.abs(lse - exact).mean()) < 0.2
        True
    """
    causal, return_lse = flag(causal, "causal"), flag(return_lse, "return_lse")
    block_size, sample_size = integer(block_size, "block_size", 1), integer(sample_size, "sample_size", 0)
    lsh_num_projs = integer(lsh_num_projs, "lsh_num_projs", 1, _MOST_PROJECTIONS)
    min_seq_len, seed = integer(min_seq_len, "min_seq_len", 1), integer(seed, "seed", 0)
    one_of(order, "order", ("inverse_gray", "reference"))
    q3, k3, v3 = dense_inputs(q, k, v)
    qn, kn = selector_inputs(q3, k3)
    vn, factor = batched(v3, 4), scale_factor(scale, qn.shape[3])
    rows, keys = qn.shape[2], kn.shape[2]
    if causal and rows > keys:
        raise ValueError(f"q: got {rows} queries, expected at most the {keys} keys of k with causal")
    shape = (*q3.shape[:-1], v3.shape[-1])
    result = result_array(out, q, shape, q3.dtype, {} if out is None else {"q": qn, "k": kn, "v": vn})
    sampler = _Sampler(qn.shape[3], block_size, sample_size, lsh_num_projs, min_seq_len, order, seed)
    if not causal:
        exact = rows <= min_seq_len or not keys
        part = attention(qn, kn, vn, scale=factor, return_lse=True) if exact else sampler.hashed(qn, kn, vn, factor)
    else:
        before, own = np.s_[:, :, : keys - rows], np.s_[:, :, keys - rows :]
        part = sampler.causal(qn, kn[own], vn[own], factor)
        if keys > rows:
            part = _merged(part, sampler.square(qn, kn[before], vn[before], factor))
    batched(result, 4)[...] = part[0]
    return returned(out, q, result, part[1].reshape(shape[:-1]) if return_lse else None)


METHOD = Method(
    name="hyper_attention",
    family="hash",
    title="HyperAttention: Long-context Attention in Near-Linear Time",
    year=2023,
    arxiv="2310.05869",
    function=hyper_attention,
    reference=reference.hyper_attention,
    exact=False,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "With one block for all keys it is dense attention.",
        "With no more queries than `min_seq_len` it is dense attention, causal or not.",
        "The mean of `exp(lse)` over seeds is the sum of `e^logit` over all keys.",
        "Without samples the order of keys and values does not matter.",
        "A seed gives the same bits whatever the number of threads.",
    ),
    tests="tests/sparse/test_hyper_attention.py",
    cost="`Lq (block_size + sample_size) (D + Dv)` multiply-adds per query head, causal by `log2(Lq / min_seq_len)`.",
    mask=lambda: seen(hyper_attention, *example(), block_size=16, sample_size=16, min_seq_len=16),
)
