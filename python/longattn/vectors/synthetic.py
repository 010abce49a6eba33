"""Out-of-distribution synthetic heads: what makes real keys hard for an index, from a seed alone.

Clustered head (`synthetic`, `synthetic-flat`): a token's content z is a cluster centre plus noise with a
decaying spectrum, in runs of 32 tokens; keys are W_k z plus an offset with two massive channels, rotated by
position (RoPE). The group's queries read fresh content through other projections, partly shared, with another
offset, at the last position. Values are a low-rank map of the content plus noise.

Generated text drifts (`drifting_head`): a prefill speaks of three quarters of the clusters, what follows of others,
a third of them new, and of all of it moved by a common offset. The queries at the end ask about what was generated.

Induction head (`synthetic-sharp`): the key of a token holds the embedding of the token before it, the query
asks for one token, the value holds the token itself: a few exact matches among Zipf-distributed distractors.
Partial RoPE (32 of 128 dimensions).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Head = tuple[Floats, Floats, Floats, Floats]
"""keys [n, D], values [n, D], queries [groups, GROUP, D], prefill queries [PREFILL, GROUP, D]."""

NAMES = ("synthetic", "synthetic-flat", "synthetic-sharp")
HEADS = tuple(str(i) for i in range(8))
HEAD_DIM, GROUP, PREFILL = 128, 4, 512
CONTENT_DIM, CLUSTERS, RUN = 64, 256, 32
DRIFTING = ("synthetic", "synthetic-flat")
OF_PREFILL, OF_GENERATED = (0, 192), (64, 256)  # clusters
ROPE_THETA = 5e5
VOCABULARY, EMBEDDING, PARTIAL_ROPE = 8192, 96, 32
INDUCTION_GAINS = (18.0, 15.0, 15.0, 12.0)  # from sharp to flat


def head(name: str, number: int, length: int, groups: int, seed: int) -> Head:
    """One KV head and its queries; `number` and `seed` choose its content and projections."""
    rng = np.random.default_rng([seed, number])
    if name == "synthetic-sharp":
        return _induction_head(rng, length, groups)
    return _clustered_head(rng, length, groups, _gain(name), None)[0]


def drifting_head(name: str, number: int, prefill: int, length: int, groups: int, seed: int) -> tuple[Head, Floats]:
    """One KV head whose content changes behind `prefill` rows, and the queries that ask from the prefill's end."""
    made, first = _clustered_head(np.random.default_rng([seed, number]), length, groups, _gain(name), prefill)
    assert first is not None
    return made, first


def _gain(name: str) -> float:
    return 0.5 if name == "synthetic-flat" else 1.0


def _clustered_head(
    rng: np.random.Generator, length: int, groups: int, query_gain: float, prefill: int | None
) -> tuple[Head, Floats | None]:
    centres = 1.5 * _normal(rng, CLUSTERS, CONTENT_DIM)
    spectrum = np.linspace(1.5, 0.2, CONTENT_DIM, dtype=np.float32)
    of_keys, shared = _normal(rng, 2, CONTENT_DIM, HEAD_DIM) / np.sqrt(CONTENT_DIM, dtype=np.float32)
    own = _normal(rng, GROUP, CONTENT_DIM, HEAD_DIM) / np.sqrt(CONTENT_DIM, dtype=np.float32)
    of_queries = 0.5 * of_keys + 0.8 * (0.6 * shared + 0.8 * own)
    # Massive channels sit in pairs that rotate slowly, as in trained models: they survive RoPE.
    key_offset, query_offset = _offsets(rng, (61, 126))
    query_offsets = query_offset + 0.2 * _normal(rng, GROUP, HEAD_DIM)

    def content(n: int, run: int, clusters: tuple[int, int] = (0, CLUSTERS)) -> Floats:
        cluster = np.repeat(rng.integers(*clusters, -(-n // run)), run)[:n]
        return (centres[cluster] + _normal(rng, n, CONTENT_DIM)) * spectrum

    def queries(positions: NDArray[np.int64], seen: Floats) -> Floats:
        n = len(positions)
        raw = np.einsum("nz,gzd->ngd", seen, of_queries) + query_offsets + 0.15 * _normal(rng, n, GROUP, HEAD_DIM)
        return query_gain * _rope(raw, positions, HEAD_DIM)

    if prefill is None:
        text = content(length, RUN)
    else:
        moved = _normal(rng, CONTENT_DIM) * spectrum
        text = np.concatenate([content(prefill, RUN, OF_PREFILL), content(length - prefill, RUN, OF_GENERATED) + moved])
    keys = _rope(text @ of_keys + key_offset + 0.15 * _normal(rng, length, HEAD_DIM), np.arange(length), HEAD_DIM)
    values = text @ (_normal(rng, CONTENT_DIM, 16) @ _normal(rng, 16, HEAD_DIM))
    values /= values.std()
    values += 0.7 * _normal(rng, length, HEAD_DIM) + 0.3 * _normal(rng, HEAD_DIM)
    if prefill is None:
        asked = queries(np.full(groups, length - 1), content(groups, 1))
        return (keys, values, asked, queries(rng.integers(length // 8, length, PREFILL), content(PREFILL, 1))), None
    asked = queries(np.full(groups, length - 1), content(groups, 1, OF_GENERATED) + moved)
    first = queries(np.full(groups, prefill - 1), content(groups, 1, OF_PREFILL))
    places = rng.integers(prefill // 8, prefill, PREFILL)
    return (keys, values, asked, queries(places, content(PREFILL, 1, OF_PREFILL))), first


def _induction_head(rng: np.random.Generator, length: int, groups: int) -> Head:
    text = _zipf_text(rng, length)
    before = np.concatenate([[0], text[:-1]])
    embedding = _normal(rng, VOCABULARY, EMBEDDING)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    key_offset, query_offset = _offsets(rng, (40, 100))

    def mix(token: NDArray[np.int64], offset: Floats, gain: float, positions: NDArray[np.int64]) -> Floats:
        n = len(token)
        noisy = gain * (embedding[token] + 0.15 / np.sqrt(EMBEDDING) * _normal(rng, n, EMBEDDING))
        raw = np.concatenate([0.5 * _normal(rng, n, PARTIAL_ROPE), noisy], 1) + offset
        return _rope(raw.astype(np.float32), positions, PARTIAL_ROPE)

    # Ask for tokens that occur, but not everywhere: an induction head's usual case.
    counts = np.bincount(before, minlength=VOCABULARY)
    askable = np.flatnonzero((counts >= 1) & (counts <= 60))

    def queries(positions: NDArray[np.int64]) -> Floats:
        token, other = rng.choice(askable, (2, len(positions)))
        scale = np.sqrt(HEAD_DIM) / 8
        # The third head of the group asks for another token than its neighbours.
        asked = (token, token, other, token)
        return np.stack([mix(asked[g], query_offset, INDUCTION_GAINS[g] * scale, positions) for g in range(GROUP)], 1)

    keys = mix(before, key_offset, 8.0, np.arange(length))
    values = _normal(rng, VOCABULARY, HEAD_DIM)[text]
    values += 0.5 * _normal(rng, length, HEAD_DIM) + 0.3 * _normal(rng, HEAD_DIM)
    return (
        keys,
        values,
        queries(np.full(groups, length - 1)),
        queries(rng.integers(length // 8, length, PREFILL)),
    )


def _zipf_text(rng: np.random.Generator, length: int) -> NDArray[np.int64]:
    """Tokens by Zipf's law; a quarter of them repeats one of the last 256 tokens, as text does."""
    chance = 1 / np.arange(3, VOCABULARY + 3)
    text = rng.choice(VOCABULARY, length, p=chance / chance.sum())
    repeats = rng.random(length) < 0.25
    back = rng.integers(1, 257, length)
    for i in np.flatnonzero(repeats):  # in order: a repeat may repeat a repeat
        if i >= back[i]:
            text[i] = text[i - back[i]]
    return text


def _offsets(rng: np.random.Generator, massive: tuple[int, int]) -> tuple[Floats, Floats]:
    """Offsets of keys and of queries, with two massive channels each."""
    of_keys, of_queries = 0.7 * _normal(rng, 2, HEAD_DIM)
    of_keys[list(massive)] += (9, -7)
    of_queries[list(massive)] += (3, -4)
    return of_keys, of_queries


def _rope(x: Floats, positions: NDArray[np.int64], rotated: int) -> Floats:
    """Rotates the first `rotated` dimensions of x [n, ..., D] in halves by the positions [n]."""
    half = rotated // 2
    angle = positions[:, None] * ROPE_THETA ** (-np.arange(half) / half)
    shape = (len(positions),) + (1,) * (x.ndim - 2) + (half,)
    cos, sin = (
        np.cos(angle).astype(np.float32).reshape(shape),
        np.sin(angle).astype(np.float32).reshape(shape),
    )
    out = x.copy()
    out[..., :half] = x[..., :half] * cos - x[..., half:rotated] * sin
    out[..., half:rotated] = x[..., :half] * sin + x[..., half:rotated] * cos
    return out


def _normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)
