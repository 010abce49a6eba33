"""`Signatures`: a few bits per dimension of every key."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._checks import integer
from longattn.index._index import Index, check_seed, check_store
from longattn.kv import KVStore


class Signatures(Index):
    """Codes of every key of a store: 1, 2 or 4 bits per dimension, scanned instead of the keys.

    Each key, less the head's mean key and turned by a random rotation, is replaced by the grid point nearest in
    angle and one factor that makes the estimated inner product with any query unbiased over rotations, with a
    known standard deviation (RaBitQ). With 4 bits logits are estimated to 0.1 to 0.4 nats on real keys, which is
    good enough for the weights of rows that are not read; 1 and 2 bits scan faster and rank worse. Beside the
    codes, every row's value belongs to one of at most 256 clusters per head, whose means stand in for the values
    that are not read.

    The index grows with its store by itself: `retrieval_attention` codes what was appended since the last call,
    16 rows at a time (rows without a code are read exactly), and follows `truncate`. The mean key and the clusters
    are fitted at the first use, once the store has 512 rows, and again whenever it has grown fourfold.

    Several threads may use one index.

    Args:
        store: the store to index; it is kept alive.
        bits: bits per dimension: 1, 2 or 4.
        seed: seed of the rotation and of the clusters: the same rows and seed give the same codes.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument out of range.

    Cost:
        Memory: `bits * head_dim / 8 + 3` bytes per key and KV head. Build: `head_dim * (head_dim + 256)`
        multiply-adds per key and KV head, and the clusters' fit on a sample of 16,384 rows.

    References:
        J. Gao, C. Long, "RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound for
        Approximate Nearest Neighbor Search", 2024; J. Gao et al., "Practical and Asymptotically Optimal
        Quantization of High-Dimensional Vectors in Euclidean Space for Approximate Nearest Neighbor Search",
        2025.
    """

    __slots__ = ()

    KIND: ClassVar[str] = "signatures"

    def __init__(self, store: KVStore, bits: int = 4, *, seed: int = 0) -> None:
        check_store(store)
        bits = integer(bits, "bits")
        if bits not in (1, 2, 4):
            raise ValueError(f"bits: got {bits}, expected 1, 2 or 4")
        seed = check_seed(seed)
        self._set(_core.signatures(store._handle, bits, seed), store)

    @property
    def bits(self) -> int:
        """Bits per dimension."""
        return int(self.parameters["bits"])

    def sigma(self) -> NDArray[np.float32]:
        """Root mean square error of an estimated `q . k` per KV head, `[kv_heads]`, for a query of norm 1.

        Times the norm of a query and the softmax scale: the error of its logits in nats. Empty before the first
        codes.
        """
        return np.asarray(_core.signatures_sigma(self._handle), np.float32)
