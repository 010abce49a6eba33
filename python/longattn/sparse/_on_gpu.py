"""Lists on their way to a GPU, in the form of its kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import gpu
from longattn._checks import flag
from longattn.dense._options import gpu_options
from longattn.gpu._checks import listed_rows
from longattn.gpu.attention import BLOCK_KEYS, DECODE_ROWS
from longattn.sparse._call import check_fit
from longattn.sparse.block_mask import BlockMask
from longattn.sparse.row_lists import RowLists


def over_blocks(q: Any, k: Any, v: Any, mask: BlockMask, *, return_lse: bool, **options: Any) -> Any:
    """`longattn.block_sparse_attention` on arrays of a GPU."""
    taken = gpu_options(options)
    heads = _check(q, k, mask, "block_mask")
    if mask.block_k % BLOCK_KEYS or mask.block_q % BLOCK_KEYS or mask.first_q != mask.block_q:
        raise ValueError(
            f"block_mask: got blocks of {mask.block_q} queries (the first of {mask.first_q}) and {mask.block_k} keys, "
            f"expected multiples of {BLOCK_KEYS} and no shorter first block on a GPU"
        )
    starts, blocks = block_lists(mask)
    shape = q.shape[0], heads, starts.shape[2]
    starts = np.broadcast_to(np.repeat(starts, heads // starts.shape[1], axis=1), shape)
    return gpu.block_sparse_attention(q, k, v, starts, blocks, return_lse=flag(return_lse, "return_lse"), **taken)


def over_rows(q: Any, k: Any, v: Any, lists: RowLists, *, return_lse: bool, **options: Any) -> Any:
    """`longattn.sparse.index_sparse_attention` on arrays of a GPU, for decode steps."""
    if lists.bias is not None:
        raise ValueError("lists: got a bias, which is not offered for arrays of a GPU")
    taken = gpu_options(options)
    heads = _check(q, k, lists, "lists")
    batch, kv_heads, positions = q.shape[0], k.shape[1], q.shape[2]
    rows = heads // kv_heads * positions
    if lists.query_blocks != 1 or kv_heads % lists.shape[1] or rows > DECODE_ROWS:
        raise ValueError(
            f"lists: got {lists.query_blocks} blocks of queries and {lists.shape[1]} heads for {rows} rows per KV "
            f"head, expected one block of at most {DECODE_ROWS} rows and a list per KV head on a GPU"
        )
    if flag(taken.pop("causal", False), "causal") and positions > 1:
        raise ValueError("causal: not offered for listed rows of several queries on a GPU")
    offered = {"scale", "softcap", "sinks", "state"}
    for name, value in taken.items():
        if name not in offered and value is not None and not (name == "window" and tuple(value) == (-1, -1)):
            raise ValueError(f"{name}: not offered for lists on a GPU, where options are {', '.join(sorted(offered))}")
    listed, lengths = (
        np.broadcast_to(np.repeat(x, kv_heads // lists.shape[1], axis=1), (batch, kv_heads, *x.shape[2:]))
        for x in listed_rows([lists.indices[a:b] for a, b in lists.indptr.reshape(-1, 2)], lists.shape[:2])
    )
    given = {name: taken[name] for name in offered & set(taken)}
    return gpu.index_sparse_attention(q, k, v, listed, lengths, return_lse=flag(return_lse, "return_lse"), **given)


def block_lists(mask: BlockMask) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts `[B, H, blocks of 64 queries + 1]` and numbers of blocks of 64 keys."""
    batch, heads, query_blocks = mask.shape
    per_row, per_key = mask.block_q // BLOCK_KEYS, mask.block_k // BLOCK_KEYS
    rows, keys = (-(-n // BLOCK_KEYS) for n in mask.lengths)
    # The list of each block of 64 queries, and its first and last entry.
    lists = np.arange(batch * heads * query_blocks).reshape(batch, heads, query_blocks)
    lists = np.repeat(lists, per_row, axis=2)[:, :, :rows]
    bounds = mask._flat()
    counts = np.diff(bounds)[lists.ravel()]
    ends = np.cumsum(counts)
    at = np.repeat(bounds[lists.ravel()] - (ends - counts), counts) + np.arange(counts.sum())
    blocks = (mask.indices[at].astype(np.int64)[:, None] * per_key + np.arange(per_key)).ravel()
    of_list = np.repeat(np.arange(lists.size), counts * per_key)
    there = blocks < keys  # of the last block of keys there may be less
    ends = np.cumsum(np.bincount(of_list[there], minlength=lists.size)).reshape(batch, heads, rows)
    flat = np.concatenate([[0], ends.ravel()])
    first = flat[np.arange(batch * heads) * rows].reshape(batch, heads, 1)
    return np.concatenate([first, ends], axis=2), blocks[there]


def _check(q: Any, k: Any, lists: Any, name: str) -> int:
    """Query heads, where lists are of this problem."""
    for x, of in ((q, "q"), (k, "k")):
        if not hasattr(x, "shape") or len(x.shape) != 4:
            raise ValueError(f"{of}: got {getattr(x, 'shape', type(x).__name__)}, expected rank 4 on a GPU")
    check_fit(lists, name, tuple(q.shape), tuple(k.shape))
    return int(q.shape[1])
