"""Exact attention over chosen blocks of keys."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array
from longattn.gpu import is_on_gpu
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._call import call
from longattn.sparse._on_gpu import over_blocks
from longattn.sparse.block_mask import BlockMask


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    block_mask: BlockMask,
    *,
    causal: bool = False,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    **options: Any,
) -> Any:
    """Softmax attention of each block of queries over its blocks of keys, in time proportional to their number.

    What `longattn.attention` computes with the mask that `block_mask` stands for, by the same kernels: keys outside
    it are not read. Rows without keys give zeros and an lse of -inf.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes, or the `keys` of a `KVStore` of codes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        block_mask: which blocks of keys each block of queries attends to. Neighbouring blocks of queries with the same
            list go together, so masks put together from ones with other block sizes cost no more than those.
        causal: besides, a query sees only keys at its own position and before.
        cu_seqlens_q: bounds `[S + 1]` of sequences that a batch of 1 holds one after another: queries see keys of their
            own sequence, in which positions count. The mask is over all of them; its blocks may reach over several.
        cu_seqlens_k: bounds of their keys; `None` are those of the queries.
        return_lse: also return the log-sum-exp of the logits.
        out: array `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`) of the kind and dtype of `q` that receives the result.
        options: `window`, `scale`, `softcap`, `bias`, `mask`, `alibi_slopes`, `sinks`, `relative_bias`,
            `relative_zero`, `segments`, `visible_until`, `skip_threshold` and `state` of `longattn.attention`. With
            `cu_seqlens_q` `bias`, `mask`, `segments` and `visible_until` are not offered, and a `scale` by head and
            `alibi_slopes` are `[Hq]`.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`. With `return_lse`, the pair
        `(output, lse)`, `lse` float32 `[B, Hq, Lq]` (or `[Hq, Lq]`).

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a mask of another problem.

    Cost:
        `(D + Dv)` multiply-adds per query head, query and key of its blocks (whole blocks, but for what causality
        and windows leave out at their edges). Keys are packed once for up to 192 rows of a query block and the
        query heads that share its list: small blocks of queries pack more often.

    Arrays of a GPU go to `longattn.gpu`: blocks of queries and of keys are multiples of 64 then, `skip_threshold`,
    `cu_seqlens_q` and `out` are not offered.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 256, 16), dtype=np.float32)
        >>> diagonal = np.eye(4, dtype=bool)
        >>> mask = la.BlockMask.from_blocks(diagonal, lengths=(256, 256), block_q=64, block_k=64)
        >>> out = la.block_sparse_attention(q, k, v, mask)
        >>> np.allclose(out[:, :64], la.attention(q[:, :64], k[:, :64], v[:, :64]), atol=1e-5)
        True
    """
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask: got {type(block_mask).__name__}, expected a BlockMask")
    if is_on_gpu(q):
        bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        return over_blocks(q, k, v, block_mask, causal=causal, return_lse=return_lse, out=out, **bounds, **options)
    return call(
        _core.block_sparse,
        block_mask,
        "block_mask",
        (block_mask.key_bounds,),
        q,
        k,
        v,
        packed=(cu_seqlens_q, cu_seqlens_k),
        causal=causal,
        return_lse=return_lse,
        out=out,
        **options,
    )


def _example() -> NDArray[np.bool_]:
    """Some blocks of a text."""
    blocks = np.random.default_rng(0).random((8, 8)) < 0.3
    mask = BlockMask.from_blocks(blocks | np.eye(8, dtype=bool), lengths=(128, 128), block_q=16, block_k=16)
    return seen(block_sparse_attention, *example(), mask, causal=True)


METHOD = Method(
    name="block_sparse_attention",
    family="sparse",
    title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
    year=2022,
    arxiv="2205.14135",
    function=block_sparse_attention,
    reference=reference.block_sparse_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "All blocks are dense attention.",
        "Masks without a common block, one carried on from the other's state, are their union.",
        "A threshold of skipping leaves out what it says at most.",
        "A sequence among others is that sequence alone.",
        "A mask over smaller blocks, cut from a mask, gives the same.",
    ),
    tests="tests/sparse/test_block_sparse_attention.py",
    cost="`(D + Dv)` multiply-adds per query head, query and key of its blocks.",
    mask=_example,
)
