"""`Collisions`: keys vote for themselves by the sign patterns they share with a query's best."""

from __future__ import annotations

from typing import ClassVar

from longattn import _core
from longattn._checks import real
from longattn.index._index import Index, check_seed, check_store
from longattn.kv import KVStore


class Collisions(Index):
    """Sign patterns of every key of a store, which vote for candidates, and 4-bit codes, which rank them.

    Keys are turned by a random rotation and cut into subspaces of 8 dimensions; in each, a key belongs to the one of
    256 centroids, the patterns of signs, that is nearest in angle. A query ranks the centroids of each subspace by the
    product with its own part. With n keys, a centroid gets one vote for each of the six tiers 0.05, 0.15, 0.3, 0.5,
    0.75 and 1 for which fewer than `n * collision_ratio * tier` keys belong to better centroids; a key has the votes
    of its centroids in all subspaces. The `candidate_ratio` keys of most votes are ranked by the estimated product of
    4-bit codes. Nothing is fitted to the keys, so new ones of another kind are indexed as well as old ones.

    All of it is done for the mean query of the group, which has the mean logits. There is no estimate of logits beyond
    the candidates: only `top_k` with `rest="none"` works.

    The published method scales its 4-bit codes per subspace; here they are those of `Signatures` (the nearest grid
    point in angle, one factor per key), without a mean key. Votes count the keys of the whole index, sinks and window
    among them.

    The index grows with its store by itself, 64 rows at a time (rows without a code are read exactly), and follows
    `truncate`. Several threads may use one index.

    Args:
        store: the store to index; it is kept alive.
        seed: seed of the rotation.
        collision_ratio: share of the keys that get votes in a subspace, above 0 and at most 1. `None`: 0.5, 0.3,
            0.25, 0.2 for fewer than 5,000, 10,000, 30,000 and more keys to choose from.
        candidate_ratio: share of the keys that become candidates, likewise. `None`: 0.5, 0.25, 0.2, 0.1.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument out of range, a store of codes, or a `head_dim` above 1,024.

    Cost:
        Memory: `head_dim / 8 + head_dim / 2 + 4` bytes per key and KV head. Build: `head_dim ** 2` multiply-adds per
        key and KV head. A scan reads `head_dim / 8` bytes per key, and `head_dim / 2 + 4` of each candidate.

    References:
        Y. Qi et al., "ParisKV: Fast and Drift-Robust KV-Cache Retrieval for Long-Context LLMs", 2026,
        arXiv:2602.07721.
    """

    __slots__ = ()

    KIND: ClassVar[str] = "collisions"

    def __init__(
        self,
        store: KVStore,
        *,
        seed: int = 0,
        collision_ratio: float | None = None,
        candidate_ratio: float | None = None,
    ) -> None:
        check_store(store)
        ratios = (_ratio(collision_ratio, "collision_ratio"), _ratio(candidate_ratio, "candidate_ratio"))
        self._set(_core.collisions(store._handle, check_seed(seed), *ratios), store)


def _ratio(value: object, name: str) -> float | None:
    if value is None:
        return None
    ratio = real(value, name)
    if not 0 < ratio <= 1:
        raise ValueError(f"{name}: got {value}, expected above 0 and at most 1")
    return ratio
