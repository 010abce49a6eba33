"""ParisKV's collision votes and reranking: float64 numpy, from the definitions. Nothing is checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.retrieval.retrieval_attention import attention, candidates
from longattn.reference.retrieval.signatures import encode, estimate, rotation

Float64 = NDArray[np.float64]
Rows = NDArray[np.int64]

#: Dimensions of a subspace, and the shares of keys that its tiers reach to.
SUBSPACE, TIERS = 8, (0.05, 0.15, 0.3, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class VotedAttention:
    """Output `[Hq, Lq, Dv]`, lse `[Hq, Lq]` and selected rows `[Hkv][Lq]`."""

    out: Float64
    lse: Float64
    selected: list[list[Rows]]


def patterns(x: ArrayLike, seed: int) -> NDArray[np.int64]:
    """Patterns `[N, subspaces]` of keys `[N, D]`: bit t of subspace s is 1 where dimension 8 s + t is not below 0."""
    turned = np.asarray(x, np.float64) @ rotation(np.shape(x)[-1], seed).T
    signs = np.pad(turned >= 0, ((0, 0), (0, -turned.shape[-1] % SUBSPACE)))
    numbers: NDArray[np.int64] = (signs.reshape(len(turned), -1, SUBSPACE) * 2 ** np.arange(SUBSPACE)).sum(axis=-1)
    return numbers


def votes(q: ArrayLike, of_keys: NDArray[np.int64], ratio: float, seed: int) -> NDArray[np.int64]:
    """Votes `[N]` of keys with these patterns for a query `[D]`."""
    turned = rotation(np.shape(q)[-1], seed) @ np.asarray(q, np.float64)
    parts = np.pad(turned, (0, -len(turned) % SUBSPACE)).reshape(-1, SUBSPACE)
    signs = np.where(np.arange(256)[:, None] >> np.arange(SUBSPACE) & 1, 1.0, -1.0)
    total = np.zeros(len(of_keys), np.int64)
    for part, own in zip(parts, of_keys.T, strict=True):
        counts = np.bincount(own, minlength=256)
        order = np.argsort(-(signs @ part), kind="stable")
        better = np.empty(256, np.int64)
        better[order] = np.cumsum(counts[order]) - counts[order]
        for tier in TIERS:
            total += (better < math.ceil(len(own) * ratio * tier))[own]
    return total


def ratios(count: int) -> tuple[float, float]:
    """Collision and candidate ratio for so many keys to choose from."""
    for limit, collisions, chosen in ((5_000, 0.5, 0.5), (10_000, 0.3, 0.25), (30_000, 0.25, 0.2)):
        if count < limit:
            return collisions, chosen
    return 0.2, 0.1


def pariskv_attention(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    seed: int = 0,
    collision_ratio: float | None = None,
    candidate_ratio: float | None = None,
    coded: int | None = None,
    *,
    top_k: int = 100,
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
) -> VotedAttention:
    """Attention to the keys of most votes and then of the largest estimated products with the group's mean query.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        values: `[Hkv, N, Dv]`.
        seed: seed of the rotation.
        collision_ratio: share of the keys that get votes in a subspace; default by their number.
        candidate_ratio: share of the keys that become candidates; default by their number.
        coded: rows that have a code, others are always read; default all.
        top_k: rows selected per KV head, beside sinks and window.
        sinks: first rows, always read.
        window: last rows, always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
    """
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    heads, rows, dim = q.shape
    kv_heads, length, _ = keys.shape
    coded = length if coded is None else coded
    factor = dim**-0.5 if scale is None else scale
    selected: list[list[Rows]] = []
    for h in range(kv_heads):
        of_keys, codes = patterns(keys[h, :coded], seed), encode(keys[h, :coded], 4, seed, centred=False)
        of_head = []
        for i in range(rows):
            mean = factor * q[h * heads // kv_heads : (h + 1) * heads // kv_heads, i].mean(axis=0)
            among = candidates(length - rows + i + 1, coded, sinks, window)
            colliding, chosen = ratios(len(among))
            colliding = colliding if collision_ratio is None else collision_ratio
            chosen = chosen if candidate_ratio is None else candidate_ratio
            score = votes(mean, of_keys, colliding, seed)[among]
            best = among[np.argsort(-score, kind="stable")][: max(top_k, math.ceil(len(among) * chosen))]
            best.sort()
            ranked = best[np.argsort(-estimate(mean, codes)[best], kind="stable")][:top_k]
            of_head.append(np.sort(ranked))
        selected.append(of_head)
    exact = attention(q, keys, values, selected, coded, sinks=sinks, window=window, scale=scale)
    return VotedAttention(exact.out, exact.lse, selected)
