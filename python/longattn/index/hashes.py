"""`Hashes`: plain sign codes of every key."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, flag, integer
from longattn.index._index import Index, check_seed, check_store
from longattn.index.train_hash_weights import MAX_BITS, train_hash_weights
from longattn.kv import KVStore


class Hashes(Index):
    """Sign codes of every key of a store, ranked by their Hamming distance to those of the queries.

    Bit t of a key's code is 1 where `(k @ W)[t] > 0`. With random weights the share of bits in which two codes
    differ estimates the angle between the vectors (SimHash); `train_hash_weights` learns weights that rank the keys
    of a model better (HATA). Distances are summed over the query heads of a KV head, which select one list of rows.
    They estimate no logits: only `top_k` with `rest="none"` works on them.

    The index grows with its store by itself, 64 rows at a time (rows without a code are read exactly), and follows
    `truncate`. Several threads may use one index.

    Args:
        store: the store to index; it is kept alive.
        weights: floating `[kv_heads, head_dim, code_bits]`, at most 512 bits. `None`: learned from `queries` and the
            rows that the store has, where there are queries, else random ones.
        code_bits: bits of a code, where `weights` is `None`.
        seed: seed of such weights.
        queries: queries of the prefill, `[Hq, n, D]`, to learn weights from by `train_hash_weights`.
        use_norm: rank by agreeing less differing bits, times the norm of the key (kept as float16, where the
            largest stands for all beyond): that follows the inner product, not the angle.

    Raises:
        TypeError: an argument of another kind.
        ValueError: weights of another shape or that are not finite, queries beside weights or on an empty store, or
            a store of codes.

    Cost:
        Memory: `code_bits / 8` bytes per key and KV head, 2 more with norms. Build: `head_dim * code_bits`
        multiply-adds per key and KV head. A scan reads the codes once, whatever the number of query heads.

    References:
        M. Charikar, "Similarity Estimation Techniques from Rounding Algorithms", 2002; P. Gong et al., "HATA:
        Trainable and Hardware-Efficient Hash-Aware Top-k Attention for Scalable Large Model Inference", 2025.
    """

    __slots__ = ()

    KIND: ClassVar[str] = "hashes"

    def __init__(
        self,
        store: KVStore,
        weights: Array | None = None,
        *,
        code_bits: int = 128,
        seed: int = 0,
        queries: Array | None = None,
        use_norm: bool = False,
    ) -> None:
        check_store(store)
        if weights is None and queries is not None:
            weights = train_hash_weights(queries, store.keys, code_bits, seed=seed)
        elif weights is None:
            weights = random_weights(store.kv_heads, store.head_dim, code_bits, seed=seed)
        elif queries is not None:
            raise ValueError("queries: got some beside weights, expected one of the two")
        given = as_numpy(weights, "weights")
        check_floating(given, "weights")
        if given.ndim != 3 or given.shape[:2] != (store.kv_heads, store.head_dim):
            raise ValueError(
                f"weights: got shape {given.shape}, expected [{store.kv_heads}, {store.head_dim}, code_bits]"
            )
        if not 1 <= given.shape[2] <= MAX_BITS:
            raise ValueError(f"weights: got {given.shape[2]} bits, expected 1 to {MAX_BITS}")
        with np.errstate(over="ignore"):
            numbers = np.ascontiguousarray(given, np.float32)
        if not np.isfinite(numbers).all():
            raise ValueError("weights: got numbers that are no finite float32, expected finite ones")
        self._set(_core.hashes(store._handle, numbers, flag(use_norm, "use_norm")), store)

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return int(self.parameters["code_bits"])


def random_weights(kv_heads: int, head_dim: int, code_bits: int = 128, *, seed: int = 0) -> NDArray[np.float32]:
    """Weights of SimHash: independent normal numbers.

    Args:
        kv_heads: KV heads.
        head_dim: width of a key.
        code_bits: bits of a code, at most 512.
        seed: the same seed gives the same weights.

    Returns:
        float32 `[kv_heads, head_dim, code_bits]`.

    Raises:
        TypeError: an argument that is no integer.
        ValueError: one that is out of range.
    """
    shape = (
        integer(kv_heads, "kv_heads", 1),
        integer(head_dim, "head_dim", 1),
        integer(code_bits, "code_bits", 1, MAX_BITS),
    )
    return np.random.default_rng(check_seed(seed)).standard_normal(shape, dtype=np.float32)
