"""HyperAttention from its formulas: float64 numpy; hashes and samples are those of the seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention, merge

_Part = tuple[NDArray[np.float64], NDArray[np.float64]]


def rank_of(hashes: NDArray[np.int64], order: str) -> NDArray[np.int64]:
    """Where a hash stands: by the Gray code ("reference") or by its inverse."""
    if order == "reference":
        return hashes ^ (hashes >> 1)
    ranks = hashes.copy()
    for shift in (1, 2, 4, 8):
        ranks ^= ranks >> shift
    return ranks


def hyper_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
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
) -> Any:
    """See `longattn.sparse.hyper_attention`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    factor = dim**-0.5 if scale is None else scale
    random = np.random.default_rng(seed)
    directions = random.standard_normal((lsh_num_projs, dim), np.float32).astype(np.float64)

    def ranks(x: NDArray[np.float64]) -> NDArray[np.int64]:
        bits = (x @ directions.T > 0).astype(np.int64)
        return rank_of((bits << np.arange(lsh_num_projs)).sum(axis=-1), order)

    def hashed(q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64]) -> _Part:
        rows, keys = q.shape[2], k.shape[2]
        blocks = -(-keys // block_size)
        of_queries = max(1, -(-rows // blocks))
        count = sample_size if blocks > 1 else 0
        samples = random.integers(0, keys, (batch * kv_heads, count), dtype=np.uint32)
        samples = samples.reshape(batch, kv_heads, count).astype(np.int64)
        out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.zeros(q.shape[:3])
        for b, h in np.ndindex(batch, heads):
            g = h // (heads // kv_heads)
            of_q = np.argsort(ranks(q[b, h]), kind="stable")
            of_k = np.argsort(ranks(k[b, g]), kind="stable")
            for t in range(-(-rows // of_queries)):
                own = of_q[t * of_queries : (t + 1) * of_queries]
                block = of_k[t * block_size : (t + 1) * block_size]
                drawn = samples[b, g][~np.isin(samples[b, g], block)]
                weight = np.log(keys / count) if count else 0.0
                listed = np.concatenate([block, drawn])
                bias = np.concatenate([np.zeros(len(block)), np.full(len(drawn), weight)])
                one = q[b, h][None, own], k[b, g][None, listed], v[b, g][None, listed]
                part = attention(*one, bias=bias, scale=factor, return_lse=True)
                out[b, h, own], lse[b, h, own] = part[0][0], part[1][0]
        return out, lse

    def square(q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64]) -> _Part:
        if q.shape[2] < min_seq_len:
            part: _Part = attention(q, k, v, scale=factor, return_lse=True)
            return part
        return hashed(q, k, v)

    def halves(q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64]) -> _Part:
        length = q.shape[2]
        if length <= min_seq_len:
            part: _Part = attention(q, k, v, scale=factor, causal=True, return_lse=True)
            return part
        half = length // 2
        first = halves(q[:, :, :half], k[:, :, :half], v[:, :, :half])
        second = halves(q[:, :, half:], k[:, :, half:], v[:, :, half:])
        both = merge([second, square(q[:, :, half:], k[:, :, :half], v[:, :, :half])])
        return np.concatenate([first[0], both[0]], axis=2), np.concatenate([first[1], both[1]], axis=2)

    if not causal:
        exact = rows <= min_seq_len or not keys
        result = attention(q, k, v, scale=factor, return_lse=True) if exact else hashed(q, k, v)
    else:
        result = halves(q, k[:, :, keys - rows :], v[:, :, keys - rows :])
        if keys > rows:
            result = merge([result, square(q, k[:, :, : keys - rows], v[:, :, : keys - rows])])
    return result if return_lse else result[0]
