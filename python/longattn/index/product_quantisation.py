"""`ProductQuantisation`: a few bits for each part of a key."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import FLOATS, Array, as_numpy
from longattn._checks import integer
from longattn.index._index import Index, check_seed, check_store
from longattn.kv import KVStore

#: Keys that the basis of query-weighted codes is fitted to.
SAMPLE = 16_384


class ProductQuantisation(Index):
    """Product codes of every key: each subvector is replaced by the nearest of 16 or 256 centroids of its own.

    A query becomes a table of its products with all centroids, and a key's logit is the sum of the entries that its
    code names. With half a bit to one bit per dimension, where such codes are at their best, the scores rank keys
    about as well as `Signatures` of twice the bytes; from two bits on signatures are better.

    Centroids are means of the keys they stand for, so a score is the mean of the logits of its cell, and the mean of
    their weights is larger: rows left unread weigh `exp(score + sigma^2 / 2)`, `sigma^2` being the variance of the
    query's products with what the codes leave out (one covariance for each subvector, from the keys of the fit).
    That is right where residuals are Gaussian and of one size for all keys; it says nothing about single keys, and
    so there is no bound of the missed mass. The values of unread rows are the means of at most 256 value clusters,
    as in `Signatures`.

    With `queries`, codes are made for the inner products with queries like these: keys and queries are turned to a
    basis in which errors of all directions cost the same, dealt out so that each subvector has its share of the
    spread. The basis is fitted to the keys that the store has then.

    The index grows with its store: 64 rows at a time are coded, rows without a code are read exactly. Centroids are
    fitted at the first use, once the store has 512 rows, and again whenever it has grown fourfold.

    Args:
        store: the store to index; it is kept alive.
        subvectors: parts of a key; divides its width. `None` is `head_dim / 8` where that is a whole number, else the
            largest divisor of `head_dim` below it.
        bits: bits of each subvector's code: 4 or 8.
        queries: `[Hq, n, D]`, some hundred queries of the prefill: makes the codes query-weighted. The store must
            not be empty, and should hold some thousand rows.
        seed: seed of the first centroids and of the value clusters.

    Raises:
        TypeError: an argument of another kind, or a store of codes.
        ValueError: an argument out of range, or no rows or queries to fit a basis to.

    Cost:
        Memory: `subvectors * bits / 8 + 1` bytes per key and KV head, and the centroids. Building takes
        `2 ** bits * D` multiply-adds per key and KV head (`D * D` more for the basis), and the fit on 16,384 rows. A
        pick takes `subvectors` look-ups per key and query head: of 4-bit codes as many keys at a time as a vector has
        bytes.

    References:
        H. Zhang et al., "PQCache: Product Quantization-based KVCache for Long Context LLM Inference", 2024,
        arXiv:2407.12820; H. Jegou et al., "Product Quantization for Nearest Neighbor Search", 2011. Tables in vector
        registers follow F. Andre et al., "Cache locality is not enough: High-Performance Nearest Neighbor Search with
        Product Quantization Fast Scan", 2015.
    """

    __slots__ = ()

    KIND: ClassVar[str] = "product_quantisation"

    def __init__(
        self,
        store: KVStore,
        subvectors: int | None = None,
        bits: int = 4,
        *,
        queries: Array | None = None,
        seed: int = 0,
    ) -> None:
        check_store(store)
        dim = store.head_dim
        if subvectors is None:
            subvectors = next(m for m in range(max(1, dim // 8), 0, -1) if dim % m == 0)
        subvectors = integer(subvectors, "subvectors", 1, dim)
        if dim % subvectors:
            raise ValueError(f"subvectors: got {subvectors}, expected a divisor of the head_dim, {dim}")
        bits = integer(bits, "bits", 1)
        if bits not in (4, 8):
            raise ValueError(f"bits: got {bits}, expected 4 or 8")
        seed = check_seed(seed)
        bases = None if queries is None else _bases(store, queries, subvectors)
        self._set(_core.product_quantisation(store._handle, subvectors, bits, seed, bases), store)

    @property
    def subvectors(self) -> int:
        """Parts of a key."""
        return int(self.parameters["subvectors"])

    @property
    def bits(self) -> int:
        """Bits of each part's code."""
        return int(self.parameters["bits"])


def _bases(store: KVStore, queries: Array, subvectors: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Matrices of keys and of queries, `[Hkv, D, D]`, that keep inner products: `(B k) . (C q) = k . q`."""
    given = as_numpy(queries, "queries")
    if given.dtype not in FLOATS:
        raise TypeError(f"queries: got dtype {given.dtype}, expected float32, float16 or bfloat16")
    heads, dim = store.kv_heads, store.head_dim
    if given.ndim != 3 or given.shape[0] == 0 or given.shape[0] % heads or given.shape[2] != dim:
        raise ValueError(f"queries: got shape {given.shape}, expected [a multiple of {heads}, n, {dim}]")
    if given.shape[1] == 0:
        raise ValueError("queries: got none, expected some of the prefill")
    if len(store) == 0:
        raise ValueError("store: got an empty store, expected rows to fit a basis to")
    every = -(-len(store) // SAMPLE)
    of_keys, of_queries = [], []
    for h, own in enumerate(np.split(given, heads)):
        q = own.reshape(-1, dim).astype(np.float64)
        k = np.asarray(store.keys[h, ::every]).astype(np.float64)
        if not np.isfinite(q).all():
            raise ValueError("queries: got NaN or infinity, expected finite numbers")
        if not np.isfinite(k).all():
            raise ValueError(f"store: got NaN or infinity in the keys of head {h}, expected finite keys")
        moment = q.T @ q / len(q)
        moment += (0.02 * np.trace(moment) / dim + np.finfo(np.float32).tiny) * np.eye(dim)
        root, inverse = _powers(moment)
        spread, axes = np.linalg.eigh(root @ np.cov(k.T, bias=True).reshape(dim, dim) @ root)
        axes = axes[:, ::-1][:, _dealt(spread[::-1], subvectors)]
        of_keys.append(axes.T @ root)
        of_queries.append(axes.T @ inverse)
    return np.stack(of_keys).astype(np.float32), np.stack(of_queries).astype(np.float32)


def _powers(matrix: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Square root of a positive definite matrix, and its inverse."""
    values, axes = np.linalg.eigh(matrix)
    roots = np.sqrt(values)
    return (axes * roots) @ axes.T, (axes / roots) @ axes.T


def _dealt(spread: NDArray[np.float64], subvectors: int) -> list[int]:
    """Order of the axes, widest first, that gives each subvector about the same product of variances."""
    width = len(spread) // subvectors
    logs = np.log(np.maximum(spread, max(float(spread[0]), 1e-30) * 1e-12))
    logs -= logs.min() - 1.0
    parts: list[list[int]] = [[] for _ in range(subvectors)]
    sums = np.zeros(subvectors)
    for axis in range(len(spread)):
        part = min((p for p in range(subvectors) if len(parts[p]) < width), key=lambda p: sums[p])
        parts[part].append(axis)
        sums[part] += logs[axis]
    return [axis for part in parts for axis in part]
