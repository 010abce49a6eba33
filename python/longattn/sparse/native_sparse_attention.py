"""NSA: gated attention to compressed blocks, to the blocks that these point at, and to a window."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import batched, check_floating, dense_inputs, flag, integer, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._choosing import block_mass, choose
from longattn.sparse._lists import from_flat
from longattn.sparse._selecting import aligned_first, block_bounds, block_means, selector_inputs
from longattn.sparse.block_mask import BlockMask, fitted
from longattn.sparse.block_sparse_attention import block_sparse_attention
from longattn.sparse.index_sparse_attention import index_sparse_attention
from longattn.sparse.row_lists import RowLists
from longattn.sparse.sparse_attention import SparseStats

#: Importances of query rows and blocks that are held at a time.
_ROOM = 1 << 23


def compressed_limits(positions: NDArray[np.int64], block: int, stride: int, count: int) -> NDArray[np.int64]:
    """How many of the compressed blocks, which begin every `stride` keys, end at each position or before."""
    limits: NDArray[np.int64] = np.clip((positions + 1 - block) // stride + 1, 0, count)
    return limits


def overlapping_means(x: NDArray[Any], block: int, stride: int) -> NDArray[np.float32]:
    """Means of `block` rows from every `stride`-th on, as far as they are whole, `[B, H, blocks, D]`."""
    count = max(0, (x.shape[2] - block) // stride + 1)
    parts = block_means(x, np.arange(0, (x.shape[2] // stride + 1) * stride, stride))
    per = block // stride
    if not count:
        return parts[:, :, :0]
    mean: NDArray[np.float32] = np.sum([parts[:, :, i : i + count] for i in range(per)], axis=0) / np.float32(per)
    return mean


def nsa_select(
    q: NDArray[Any],
    compressed: NDArray[Any],
    keys: int,
    *,
    block: int,
    stride: int,
    select_block: int,
    n_select: int,
    n_sink: int,
    n_local: int,
    scale: float,
) -> BlockMask:
    """Blocks of `select_block` keys with the largest weights of the compressed keys in them, one list per KV head."""
    batch, heads, rows, _ = q.shape
    kv_heads, count = compressed.shape[1:3]
    positions = np.arange(rows) + (keys - rows)
    per, blocks = select_block // stride, -(-keys // select_block)
    starts = np.arange(blocks) * per
    own = positions // select_block
    step = max(1, _ROOM // max(1, heads * blocks * batch))
    indptr, parts = [np.zeros(1, np.int64)], []
    lists: list[list[tuple[NDArray[np.int64], NDArray[np.uint32]]]] = []
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        mass = block_mass(
            q[:, :, part],
            compressed,
            scale,
            limits=compressed_limits(positions[part], block, stride, count),
            blocks=(starts, starts + per),
            shifts=block // stride,
            shared=True,
        )
        limits = np.maximum(own[part] + 1, 0)
        forced = np.maximum(own[part] + 1 - n_local, 0), limits
        bounds, indices = choose(mass, limits, forced=forced, sinks=n_sink, least=n_select, most=n_select)
        flat = bounds.reshape(batch * kv_heads, bounds.shape[-1])
        lists.append([(np.diff(x), indices[x[0] : x[-1]]) for x in flat])
    for head in range(batch * kv_heads):
        for one in lists:
            indptr.append(one[head][0])
            parts.append(one[head][1])
    return BlockMask(
        indptr=from_flat(np.cumsum(np.concatenate(indptr)), (batch, kv_heads, rows)),
        indices=np.concatenate([np.zeros(0, np.uint32), *parts]),
        **fitted((rows, keys), 1, select_block),
        scored=batch * heads * int(compressed_limits(positions, block, stride, count).sum()),
    )


def compressed_lists(rows: int, keys: int, block: int, stride: int, count: int) -> RowLists:
    """The compressed keys that each query sees, those that end at its position or before."""
    # Queries whose limits are the same: the first block ends where the first of a stride does.
    first = aligned_first((rows, keys + stride - (block - 1) % stride), stride)
    bounds = block_bounds(rows, stride, first)
    limits = compressed_limits(bounds[:-1] + (keys - rows), block, stride, count)
    indices = np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in limits)])
    return RowLists(
        indptr=np.concatenate([[0], np.cumsum(limits)]).reshape(1, 1, -1),
        indices=indices,
        lengths=(rows, count),
        block_q=stride,
        first_q=first,
    )


def native_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    gates: Array,
    *,
    compressed: tuple[Array, Array] | None = None,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    n_select: int = 16,
    n_sink: int = 1,
    n_local: int = 2,
    window: int = 512,
    scale: float | None = None,
    return_stats: bool = False,
) -> Any:
    """Sum of three causal attentions, each with a gate: to compressed blocks, to selected blocks, and to a window.

    Compressed blocks are `block` keys from every `stride`-th on, as far as they are whole; a query sees those that end
    at its position or before. One key and value stand for each: given ones, or the means. The weight of a compressed
    block counts for a block of `select_block` keys once for each `stride` of keys that they share; summed over the
    query heads of a KV head, this ranks the blocks. A query takes the first `n_sink` blocks, the `n_local` last up to
    its own, and the best others, `n_select` together. A part in which a query sees nothing adds nothing.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, those of the last `Lq` keys.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        gates: factors of the three parts (compressed, selected, window), `[B, Hq, Lq, 3]` or `[Hq, Lq, 3]`.
        compressed: keys `[B, Hkv, n, D]` and values `[B, Hkv, n, Dv]` of the `n = (Lk - block) // stride + 1` blocks,
            as the model's own compression makes them; `None` takes means.
        block: keys of a compressed block, a multiple of `stride`.
        stride: keys from the beginning of one compressed block to that of the next.
        select_block: keys of a block that can be selected, a multiple of `stride`.
        n_select: blocks that a query takes.
        n_sink: first blocks that every query takes.
        n_local: last blocks up to its own that every query takes, at least 1.
        window: last keys up to its own position that a query sees in the window.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_stats: also return `SparseStats` of the selected blocks.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; with `return_stats` the pair
        `(output, stats)`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Per query head: `Lq * Lk / (2 stride) * (2 D + Dv)` multiply-adds for compressed blocks and their ranking, `Lq *
        (n_select * select_block + window) * (D + Dv)` for the others.

    References:
        J. Yuan et al., "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention", 2025,
        arXiv:2502.11089.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 600, 16), dtype=np.float32)
        >>> gates = np.broadcast_to(np.float32([0, 0, 1]), (2, 600, 3))
        >>> out = la.sparse.native_sparse_attention(q, k, v, gates, window=100)
        >>> np.allclose(out, la.attention(q, k, v, causal=True, window=(99, 0)), atol=1e-5)
        True
    """
    q3, k3, v3 = dense_inputs(q, k, v)
    qn, kn = selector_inputs(q3, k3)
    vn = batched(v3, 4)
    return_stats = flag(return_stats, "return_stats")
    stride = integer(stride, "stride", 1)
    block, select_block = integer(block, "block", 1), integer(select_block, "select_block", 1)
    for name, value in (("block", block), ("select_block", select_block)):
        if value % stride:
            raise ValueError(f"{name}: got {value}, expected a multiple of the stride, {stride}")
    n_select, n_sink = integer(n_select, "n_select", 1), integer(n_sink, "n_sink", 0)
    n_local, window = integer(n_local, "n_local", 1), integer(window, "window", 1)
    (batch, heads, rows, dim), keys = qn.shape, kn.shape[2]
    factors = as_numpy(gates, "gates")
    check_floating(factors, "gates")
    if factors.shape != (*q3.shape[:-1], 3):
        raise ValueError(f"gates: got shape {factors.shape}, expected {(*q3.shape[:-1], 3)}")
    factors = batched(factors, 4)
    factor = scale_factor(scale, dim)
    count = max(0, (keys - block) // stride + 1)
    k_c, v_c = _compressed(compressed, kn, vn, block, stride, count)
    mask = nsa_select(
        qn, k_c, keys, block=block, stride=stride, select_block=select_block, n_select=n_select, n_sink=n_sink,
        n_local=n_local, scale=factor,
    )  # fmt: skip
    out = np.zeros((batch, heads, rows, vn.shape[3]), np.float32)
    lists = compressed_lists(rows, keys, block, stride, count)
    for i in range(3):
        if i == 0:
            part = index_sparse_attention(qn, k_c, v_c, lists, scale=factor)
        elif i == 1:
            part = block_sparse_attention(qn, kn, vn, mask, causal=True, scale=factor)
        else:
            part = attention(qn, kn, vn, causal=True, window=(window - 1, 0), scale=factor)
        out += factors[..., i : i + 1].astype(np.float32) * part.astype(np.float32)
    result = like(q, out.astype(q3.dtype, copy=False).reshape(*q3.shape[:-1], vn.shape[3]))
    return (result, SparseStats.of(mask, causal=True)) if return_stats else result


def _compressed(
    given: tuple[Array, Array] | None, k: NDArray[Any], v: NDArray[Any], block: int, stride: int, count: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    if given is None:
        means = (overlapping_means(x, block, stride) for x in (k, v))
        return next(means), next(means)
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(f"compressed: got {type(given).__name__}, expected a pair of keys and values")
    found = []
    for x, whole, name in zip(given, (k, v), ("keys", "values"), strict=True):
        array = batched(as_numpy(x, "compressed"), 4)
        check_floating(array, "compressed")
        expected = (*whole.shape[:2], count, whole.shape[3])
        if array.shape != expected:
            raise ValueError(f"compressed: got {name} of shape {array.shape}, expected {expected}")
        found.append(array)
    return found[0], found[1]


METHOD = Method(
    name="native_sparse_attention",
    family="sparse",
    title="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
    year=2025,
    arxiv="2502.11089",
    function=native_sparse_attention,
    reference=reference.native_sparse_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "With the gate of the window alone it is attention to a window.",
        "With the gate of the selected blocks alone, and as many as there are, it is causal attention.",
        "With compressed blocks of one key and their gate alone it is causal attention.",
        "It is linear in the gates.",
        "Steps give the rows of the prefill.",
    ),
    tests="tests/sparse/test_native_sparse_attention.py",
    cost="Per query head `Lq * Lk / (2 stride) * (2 D + Dv) + Lq * (n_select * select_block + window) * (D + Dv)`.",
    # In the compressed part every query sees everything before it.
    mask=lambda: seen(
        native_sparse_attention,
        *example(),
        np.broadcast_to(np.array([0, 1, 1], np.float32), (1, 1, 128, 3)),
        block=8,
        stride=4,
        select_block=8,
        n_select=4,
        n_local=1,
        window=8,
    ),
    shown="without the compressed part",
)
