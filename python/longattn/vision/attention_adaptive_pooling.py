"""Keypoints of two images that stay while these are matched: likely matches, and what is attended to as much."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import integer, items_of, real
from longattn.dense._query_key import query_key_inputs
from longattn.methods import Method
from longattn.pictures import example, kept_pairs
from longattn.reference import vision as reference
from longattn.vision.token_budgets import scores, token_mass


def attention_adaptive_pooling(
    assignment: Array,
    self_layers: tuple[tuple[Array, Array], tuple[Array, Array]],
    cross_layers: tuple[tuple[Array, Array], tuple[Array, Array]],
    *,
    threshold: float = 0.1,
    uncertainty: float = 1.0,
    least: int = 256,
    scale: float | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keypoints of two images to go on with, by the matches found so far and by attention.

    Points whose assignment to the other image's points adds up to `threshold * uncertainty` stay. So do those that
    receive at least as much weight in self attention as the middle one of these, and likewise in cross attention. An
    image with at most `least` points, or without a likely match, keeps all. `pool_keypoints` chooses for one image.

    Args:
        assignment: floating `[n0 + 1, n1 + 1]`: soft matches of the points of both images, the last row and column for
            points without a match.
        self_layers: `(q, k)` of image 0, then of image 1: `[h, n, D]` each; float32, float16 or bfloat16.
        cross_layers: `(q, k)` of queries of image 1 and keys of image 0, then the other way round.
        threshold: see there, of any sign.
        uncertainty: factor on the threshold, above 0: smaller while the pose is uncertain.
        least: see there.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        Int64 numbers of the points of image 0 and of image 1 that stay, ascending.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * h * (n0 + n1) ** 2 * D` multiply-adds; no weights are stored.

    References:
        F. Xue et al., "IMP: Iterative Matching and Pose Estimation with Adaptive Pooling", 2023, arXiv:2304.14837.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> a, b = (rng.standard_normal((2, n, 16), dtype=np.float32) for n in (40, 50))
        >>> kept = longattn.vision.attention_adaptive_pooling(
        ...     rng.random((41, 51)) ** 9, ((a, a), (b, b)), ((b, a), (a, b)), threshold=6.0, least=10)
        >>> len(kept[0]) <= 40, len(kept[1]) <= 50
        (True, True)
    """
    z = scores(assignment, "assignment", (None, None))
    if 0 in z.shape:
        raise ValueError(f"assignment: got shape {z.shape}, expected [n0 + 1, n1 + 1]")
    points = [n - 1 for n in z.shape]
    confidence = z[:-1, :-1].sum(axis=1), z[:-1, :-1].sum(axis=0)
    kept = []
    for image in range(2):
        masses = []
        for layers, name, rows in (
            (self_layers, "self_layers", points[image]),
            (cross_layers, "cross_layers", points[1 - image]),
        ):
            pairs = [items_of(pair, name, "pairs (q, k)") for pair in items_of(layers, name, "two pairs (q, k)")]
            if [len(pair) for pair in pairs] != [2, 2]:
                raise TypeError(f"{name}: got {len(pairs)} of {[*map(len, pairs)]} arrays, expected two pairs (q, k)")
            qn, kn = query_key_inputs(*pairs[image])
            if qn.ndim != 3 or qn.shape[1] != rows or kn.shape[1] != points[image]:
                expected = f"[h, {rows}, D] and [h, {points[image]}, D]"
                raise ValueError(f"{name}[{image}]: got shapes {qn.shape} and {kn.shape}, expected {expected}")
            masses.append(np.asarray(token_mass(qn[None], kn[None], scale=scale))[0])
        kept.append(
            pool_keypoints(confidence[image], *masses, threshold=threshold, uncertainty=uncertainty, least=least)
        )
    return kept[0], kept[1]


def pool_keypoints(
    confidence: Array,
    self_weights: Array,
    cross_weights: Array,
    *,
    threshold: float = 0.1,
    uncertainty: float = 1.0,
    least: int = 256,
) -> NDArray[np.int64]:
    """Points of one image that stay; the middle of an even number of weights is the lower one of two.

    Args:
        confidence: floating `[n]`: sums of the points' assignments.
        self_weights: floating `[n]`: what they receive in self attention.
        cross_weights: floating `[n]`: and in cross attention.
        threshold: as in `attention_adaptive_pooling`.
        uncertainty: as there.
        least: as there.

    Returns:
        Int64 numbers, ascending.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Two sorts.
    """
    sure = scores(confidence, "confidence", (None,))
    weights = [
        scores(x, name, sure.shape) for x, name in ((self_weights, "self_weights"), (cross_weights, "cross_weights"))
    ]
    limit, factor, fewest = real(threshold, "threshold"), real(uncertainty, "uncertainty"), integer(least, "least", 0)
    if not factor > 0:
        raise ValueError(f"uncertainty: got {uncertainty}, expected above 0")
    stays = sure >= limit * factor
    if sure.size <= fewest or not stays.any():
        return np.arange(sure.size)
    likely = stays.copy()
    for x in weights:
        of_likely = np.sort(x[likely])
        stays |= x >= of_likely[(of_likely.size - 1) // 2]
    return np.flatnonzero(stays)


def _example() -> NDArray[np.bool_]:
    """Points of an image, some of them sure of a match."""
    q, k = example(64)
    sure = np.random.default_rng(0).random((65, 65)) ** 8
    layers = (q[0], k[0])
    kept, _ = attention_adaptive_pooling(sure, (layers, layers), (layers, layers), threshold=10.0, least=0)
    return kept_pairs(kept, 64)


METHOD = Method(
    name="attention_adaptive_pooling",
    family="vision",
    title="IMP: Iterative Matching and Pose Estimation with Adaptive Pooling",
    year=2023,
    arxiv="2304.14837",
    function=attention_adaptive_pooling,
    reference=reference.attention_adaptive_pooling,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "A threshold of 0 keeps everything.",
        "Few points all stay.",
        "Equal weights keep everything once a match is likely.",
        "Points with a likely match stay.",
        "A higher threshold leaves fewer of these.",
    ),
    tests="tests/vision/test_attention_adaptive_pooling.py",
    cost="`2 * h * (n0 + n1) ** 2 * D` multiply-adds; no weights are stored.",
    mask=_example,
)
