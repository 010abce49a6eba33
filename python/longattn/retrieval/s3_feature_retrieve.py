"""Retrieval by sparse features: inverted lists of a context's keys, and spans that a question has in common with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import check_float_storage, check_floating, flag, integer, integers, items_of, one_of, real
from longattn.index.features import encoder_arrays
from longattn.methods import Method
from longattn.reference import retrieval as reference

Fusion = Literal["rrf", "minmax"]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RetrievedSpans:
    """What `s3_feature_retrieve` found.

    Attributes:
        spans: int64 `[n, 2]`: first position of each span and the one after its last, in the order of the text; no
            two touch.
        scores: float32 `[N]`: score of each position before it was smoothed.
        keys_scored: positions that share a feature with the queries, over all layers.
        index_bytes: bytes of the inverted lists.
    """

    spans: NDArray[np.int64]
    scores: Float32
    keys_scored: int
    index_bytes: int


def s3_feature_retrieve(
    q: Array,
    k: Array,
    w_enc: Array,
    *,
    b_enc: Array | None = None,
    b_dec: Array | None = None,
    top_k: int = 32,
    relu: bool = True,
    idf: bool = True,
    stop_share: float = 1.0,
    chunk: int = 4096,
    radius: int = 8,
    span: int = 64,
    token_budget: int = 1024,
    text_scores: Array | None = None,
    fusion: Fusion = "rrf",
    weight: float = 0.5,
) -> RetrievedSpans:
    """Spans of a context whose keys share features with a question's queries.

    Keys are encoded chunk by chunk by a sparse autoencoder's weights and put into inverted lists, after which they
    are not needed any more. A position's score is `sum_f u_f * idf_f * a_f` over its features, `u_f` the sum of the
    queries' activations; layers add up. `select_spans` smooths the scores and picks spans, whose text is then read
    again beside the question. The parts are public, for indexes that live longer than one question:
    `sae_topk_features`, `FeatureIndex`, `bm25`, `fuse`, `select_spans`; `longattn.index.Features` picks rows of a
    store that is kept.

    Args:
        q: queries of the question `[T, D]`, or `[layers, T, D]`; float32, float16 or bfloat16.
        k: keys of the context `[N, D]`, or `[layers, N, D]`, likewise.
        w_enc: encoder weights, floating `[D, F]`, or `[layers, D, F]`.
        b_enc: encoder bias, floating `[F]` (or `[layers, F]`); `None` is zeros.
        b_dec: subtracted before encoding, floating `[D]` (or `[layers, D]`); `None` is zeros.
        top_k: features of a row. (The paper's number is not known to us.)
        relu: only features above 0 count.
        idf: weigh features by how few positions have them.
        stop_share: features that more than this share of the positions have do not count.
        chunk: rows that are encoded at a time; the result does not depend on it.
        radius: see `select_spans`.
        span: see `select_spans`.
        token_budget: see `select_spans`.
        text_scores: other scores of the positions, `[N]`, such as those of `bm25` spread over its chunks; they are
            fused with those of the features.
        fusion: see `fuse`.
        weight: see `fuse`.

    Returns:
        `RetrievedSpans`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `N * D * F` multiply-adds per layer to encode, and `6 * top_k` bytes per position; per question the length of
        the lists of its features.

    References:
        S^3-Attention, 2026, arXiv:2601.17702.

    Example:
        >>> import numpy as np, longattn as la
        >>> rng = np.random.default_rng(0)
        >>> k = rng.standard_normal((1000, 16), dtype=np.float32)
        >>> w_enc = rng.standard_normal((16, 256), dtype=np.float32)
        >>> found = la.retrieval.s3_feature_retrieve(k[500:520], k, w_enc, span=20, radius=2, token_budget=20, top_k=8)
        >>> bool(abs(found.spans[0, 0] - 500) < 20)
        True
    """
    queries, keys = (as_numpy(x, name) for x, name in ((q, "q"), (k, "k")))
    for x, name, shape in ((queries, "q", "[T, D] or [layers, T, D]"), (keys, "k", "[N, D] or [layers, N, D]")):
        check_float_storage(x, name)
        if x.ndim not in (2, 3) or x.ndim != keys.ndim or x.shape[-1] == 0:
            raise ValueError(f"{name}: got shape {x.shape}, expected {shape}")
    if queries.shape[-1] != keys.shape[-1] or queries.shape[:-2] != keys.shape[:-2]:
        raise ValueError(f"q: got shape {queries.shape}, expected layers and width of k, {keys.shape}")
    encoder = encoder_arrays(w_enc, b_enc, b_dec, ranks=(keys.ndim,))
    if as_numpy(w_enc, "w_enc", any_strides=True).shape[:-1] != (*keys.shape[:-2], keys.shape[-1]):
        expected = (*keys.shape[:-2], keys.shape[-1], "F")
        raise ValueError(f"w_enc: got shape {encoder[0].shape}, expected {expected}")
    step, count = integer(chunk, "chunk", 1), keys.shape[-2]
    _spans_arguments(radius, span, token_budget)
    best = integer(top_k, "top_k", 1, encoder[0].shape[2])
    others = None
    if text_scores is not None:
        others = as_numpy(text_scores, "text_scores")
        check_floating(others, "text_scores")
        if others.shape != (count,):
            raise ValueError(f"text_scores: got shape {others.shape}, expected {(count,)}")
    _fusion_arguments(fusion, weight)

    scores, scored, nbytes = np.zeros(count, np.float32), 0, 0
    of_layers = (x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) for x in (queries, keys))
    layers = zip(*of_layers, *encoder, strict=True)
    for own_q, own_k, *weights in layers:
        index = FeatureIndex(weights[0].shape[1], idf=idf, stop_share=stop_share)
        options = {"b_enc": weights[1], "b_dec": weights[2], "relu": relu}
        for at in range(0, count, step):
            index.add(*sae_topk_features(own_k[at : at + step], weights[0], top_k=best, **options))
        of_layer = index.search(*sae_topk_features(own_q, weights[0], top_k=best, **options))
        scores += of_layer
        scored += int(np.count_nonzero(of_layer))
        nbytes += index.nbytes
    fused = scores if others is None else fuse(scores, others, fusion=fusion, weight=weight)
    spans = select_spans(fused, token_budget, span=span, radius=radius)
    return RetrievedSpans(spans, scores, scored, nbytes)


def sae_topk_features(
    x: Array,
    w_enc: Array,
    *,
    b_enc: Array | None = None,
    b_dec: Array | None = None,
    top_k: int = 32,
    relu: bool = True,
) -> tuple[NDArray[np.uint32], Float32]:
    """Sparse features of rows: the largest of `(x - b_dec) @ w_enc + b_enc`.

    Args:
        x: rows `[T, D]`; float32, float16 or bfloat16.
        w_enc: floating `[D, F]`.
        b_enc: floating `[F]`; `None` is zeros.
        b_dec: floating `[D]`; `None` is zeros.
        top_k: features of a row.
        relu: only features above 0 count.

    Returns:
        Features, uint32 `[T, top_k]`, ascending in each row, and their activations, float32. Of equal activations the
        lower feature is taken. Rows with fewer features end with entries of activation 0, which are none.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or an activation beyond float16.

    Cost:
        `T * D * F` multiply-adds.
    """
    rows = as_numpy(x, "x")
    check_float_storage(rows, "x")
    weights, bias, centre = encoder_arrays(w_enc, b_enc, b_dec, ranks=(2,))
    if rows.ndim != 2 or rows.shape[1] != weights.shape[1]:
        raise ValueError(f"x: got shape {rows.shape}, expected [T, {weights.shape[1]}]")
    best = integer(top_k, "top_k", 1, weights.shape[2])
    features = np.zeros((rows.shape[0], best), np.uint32)
    activations = np.zeros((rows.shape[0], best), np.float32)
    _core.encode_features(rows[None], weights, bias, centre, flag(relu, "relu"), features, activations)
    return features, activations


class FeatureIndex:
    """Inverted lists of the features of positions.

    Activations are kept as float16.

    Args:
        features: number of features there are.
        idf: weigh a feature that `n` of `N` positions have by `ln((N - n + 1/2) / (n + 1/2) + 1)`.
        stop_share: features that more than this share of the positions have do not count.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number out of range.
    """

    def __init__(self, features: int, *, idf: bool = True, stop_share: float = 1.0) -> None:
        self._features = integer(features, "features", 1, 2**32 - 1)
        self._idf = flag(idf, "idf")
        self._stop_share = real(stop_share, "stop_share")
        if not 0 < self._stop_share <= 1:
            raise ValueError(f"stop_share: got {stop_share}, expected a number above 0, at most 1")
        self._postings = _core.FeaturePostings(self._features)

    def add(self, features: Array, activations: Array) -> None:
        """Adds positions after those that are there.

        Args:
            features: integers `[T, k]`, each at most once in a row.
            activations: floating `[T, k]`; 0 is no entry.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes or values that do not fit; nothing is added.
        """
        self._postings.add(*self._entries(features, activations))

    def search(self, features: Array, activations: Array) -> Float32:
        """Score of every position for queries.

        Args:
            features: the queries' features, integers `[T, k]`.
            activations: floating `[T, k]`.

        Returns:
            Float32 `[N]`: `sum_f u_f * idf_f * a_f`, `u_f` the sum of the queries' activations.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes or values that do not fit.
        """
        numbers, strengths = self._entries(features, activations)
        sums = np.bincount(numbers.ravel(), strengths.ravel(), self._features).astype(np.float32)
        own = np.flatnonzero(sums).astype(np.uint32)
        scores = np.zeros(len(self), np.float32)
        self._postings.search(own, sums[own], self._idf, self._stop_share, scores)
        return scores

    def counts(self) -> NDArray[np.int64]:
        """Positions that have each feature, `[features]`."""
        return np.asarray(self._postings.counts(), np.int64)

    def __len__(self) -> int:
        """Positions."""
        return len(self._postings)

    @property
    def nbytes(self) -> int:
        """Bytes of the lists."""
        return self._postings.nbytes

    def _entries(self, features: Array, activations: Array) -> tuple[NDArray[np.uint32], Float32]:
        numbers, strengths = as_numpy(features, "features"), as_numpy(activations, "activations")
        if numbers.dtype.kind not in "iu":
            raise TypeError(f"features: got dtype {numbers.dtype}, expected integers")
        check_floating(strengths, "activations")
        if numbers.ndim != 2 or numbers.shape[1] == 0:
            raise ValueError(f"features: got shape {numbers.shape}, expected [T, k]")
        if strengths.shape != numbers.shape:
            raise ValueError(f"activations: got shape {strengths.shape}, expected {numbers.shape} as features")
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < self._features:
            raise ValueError(
                f"features: got numbers from {numbers.min()} to {numbers.max()}, expected 0 to {self._features - 1}"
            )
        if not np.isfinite(strengths).all():
            raise ValueError("activations: got NaN or infinity, expected finite numbers")
        return np.ascontiguousarray(numbers, np.uint32), np.ascontiguousarray(strengths, np.float32)


def _tokens(given: Sequence[int] | Array, name: str) -> NDArray[np.int64]:
    """Token ids `[n]`."""
    listing = isinstance(given, tuple | list | range)
    ids = np.array(integers(given, name), np.int64) if listing else as_numpy(given, name)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{name}: got {ids.dtype} of shape {ids.shape}, expected integers [tokens]")
    return ids.astype(np.int64)


def bm25(
    query: Sequence[int] | Array, documents: Iterable[Sequence[int] | Array], *, k1: float = 1.5, b: float = 0.75
) -> NDArray[np.float64]:
    """BM25 scores of documents, or chunks of one, for a query, both as token ids.

    Args:
        query: token ids; those that occur twice count twice.
        documents: token ids of each document.
        k1: how soon further occurrences count less.
        b: how much long documents are held against, 0 to 1.

    Returns:
        `[documents]`: `sum_t idf_t * n * (k1 + 1) / (n + k1 * (1 - b + b * length / mean length))` over the query's
        tokens, `n` occurrences in the document, `idf = ln((N - n_t + 1/2) / (n_t + 1/2) + 1)`.

    Raises:
        TypeError: a number of another kind.
        ValueError: a number out of range.

    Cost:
        One pass over the documents' tokens.
    """
    soon, length = real(k1, "k1"), real(b, "b")
    if not 0 <= soon < np.inf:
        raise ValueError(f"k1: got {k1}, expected a finite number of at least 0")
    if not 0 <= length <= 1:
        raise ValueError(f"b: got {b}, expected 0 to 1")
    texts = [
        _tokens(document, f"documents[{n}]") for n, document in enumerate(items_of(documents, "documents", "texts"))
    ]
    asked, times = np.unique(_tokens(query, "query"), return_counts=True)
    if not texts:
        return np.zeros(0)
    sizes = np.array([len(text) for text in texts], np.float64)
    occurrences = np.zeros((len(texts), len(asked)))
    for n, text in enumerate(texts):
        tokens, counts = np.unique(text, return_counts=True)
        _, mine, theirs = np.intersect1d(asked, tokens, return_indices=True)
        occurrences[n, mine] = counts[theirs]
    with_token = (occurrences > 0).sum(axis=0)
    idf = np.log((len(texts) - with_token + 0.5) / (with_token + 0.5) + 1)
    mean = sizes.mean() or 1.0
    damped = occurrences + soon * (1 - length + length * sizes / mean)[:, None]
    shares = np.divide(occurrences * (soon + 1), damped, out=np.zeros_like(damped), where=occurrences > 0)
    scores: NDArray[np.float64] = shares @ (times * idf)
    return scores


def fuse(
    first: Array, second: Array, *, fusion: Fusion = "rrf", weight: float = 0.5, rank_constant: float = 60.0
) -> NDArray[np.float64]:
    """One score of two.

    The paper does not say which rule it uses; both are common.

    Args:
        first: scores, floating `[N]`.
        second: other scores of the same, floating `[N]`.
        fusion: `"rrf"`: `1 / (c + rank)` of each added up, ranks from 1, equal scores by position. `"minmax"`: scores
            brought to 0 to 1 (all equal ones to 0), then `weight * first + (1 - weight) * second`.
        weight: share of `first` in `"minmax"`.
        rank_constant: `c`.

    Returns:
        `[N]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Two sorts.
    """
    pair = [as_numpy(x, name) for x, name in ((first, "first"), (second, "second"))]
    for x, name in zip(pair, ("first", "second"), strict=True):
        check_floating(x, name)
        if x.ndim != 1 or x.shape != pair[0].shape:
            raise ValueError(f"{name}: got shape {x.shape}, expected {pair[0].shape if x.ndim == 1 else '[N]'}")
        if not np.isfinite(x.astype(np.float64)).all():
            raise ValueError(f"{name}: got NaN or infinity, expected finite numbers")
    share = _fusion_arguments(fusion, weight)
    constant = real(rank_constant, "rank_constant")
    if not 0 <= constant < np.inf:
        raise ValueError(f"rank_constant: got {rank_constant}, expected a finite number of at least 0")
    scores = [x.astype(np.float64) for x in pair]
    if fusion == "rrf":
        total = np.zeros(len(scores[0]))
        for x in scores:
            total[np.argsort(-x, kind="stable")] += 1 / (constant + np.arange(1, len(x) + 1))
        return total
    brought = []
    for x in scores:
        low, high = (x.min(), x.max()) if x.size else (0.0, 0.0)
        brought.append((x - low) / (high - low) if high > low else np.zeros_like(x))
    return share * brought[0] + (1 - share) * brought[1]


def select_spans(scores: Array, token_budget: int, *, span: int = 64, radius: int = 8) -> NDArray[np.int64]:
    """Spans of positions with high scores.

    Scores are averaged over windows of `2 * radius + 1` positions (fewer at the ends). The best position, the lower of
    equals, becomes the middle of a span, which takes what is free of the `span` positions around it; then the best one
    outside spans, until the budget is used up. Spans that touch are made one.

    Args:
        scores: floating `[N]`.
        token_budget: most positions in all; the last span is cut to fit.
        span: positions of a span.
        radius: of the windows.

    Returns:
        int64 `[n, 2]`: first position of each span and the one after its last, in order.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: a shape or values that do not fit.

    Cost:
        A sort of `N` positions.
    """
    x = as_numpy(scores, "scores")
    check_floating(x, "scores")
    if x.ndim != 1:
        raise ValueError(f"scores: got shape {x.shape}, expected [N]")
    if not np.isfinite(x.astype(np.float64)).all():
        raise ValueError("scores: got NaN or infinity, expected finite numbers")
    near, length, budget = _spans_arguments(radius, span, token_budget)
    count = len(x)
    if count == 0 or budget == 0:
        return np.zeros((0, 2), np.int64)
    if budget >= count:
        return np.array([[0, count]])
    sums = np.concatenate([[0.0], np.cumsum(x, dtype=np.float64)])
    ends = np.arange(count)
    first, last = np.maximum(ends - near, 0), np.minimum(ends + near + 1, count)
    smooth = (sums[last] - sums[first]) / (last - first)
    taken = np.zeros(count, bool)
    for middle in np.argsort(-smooth, kind="stable"):
        if taken[middle]:
            continue
        start = int(np.clip(middle - length // 2, 0, max(count - length, 0)))
        inside = np.arange(start, min(start + length, count))
        free = inside[~taken[inside]]
        if len(free) > budget:  # what lies nearest to the middle
            free = free[np.argsort(np.abs(free - middle), kind="stable")[:budget]]
        taken[free] = True
        budget -= len(free)
        if budget == 0:
            break
    edges = np.flatnonzero(np.diff(np.concatenate([[False], taken, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2).astype(np.int64)


def _spans_arguments(radius: object, span: object, token_budget: object) -> tuple[int, int, int]:
    return integer(radius, "radius", 0), integer(span, "span", 1), integer(token_budget, "token_budget", 0)


def _fusion_arguments(fusion: object, weight: object) -> float:
    one_of(fusion, "fusion", get_args(Fusion))
    share = real(weight, "weight")
    if not 0 <= share <= 1:
        raise ValueError(f"weight: got {weight}, expected 0 to 1")
    return share


METHOD = Method(
    name="s3_feature_retrieve",
    family="retrieval",
    title="S^3-Attention",
    year=2026,
    arxiv="2601.17702",
    function=s3_feature_retrieve,
    reference=reference.s3_feature_retrieve,
    exact=False,
    modes=frozenset({"non-causal", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "With all features, the unit matrix for weights, and neither relu nor idf, a score is the sum of the queries' "
        "dot products with the key.",
        "A budget of the whole context returns it.",
        "The result does not depend on the chunk.",
        "A search equals sparse dot products.",
    ),
    tests="tests/retrieval/test_s3_feature_retrieve.py",
    cost="`N * D * F` multiply-adds per layer to encode a context, 6 bytes per feature and position; per question the "
    "length of its features' lists.",
)
