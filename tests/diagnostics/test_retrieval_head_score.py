"""Retrieval head scores: sets of copied tokens, and the keys they come from."""

import numpy as np
import pytest

from longattn.diagnostics import RetrievalScores, mask_heads, retrieval_head_score, top_keys
from longattn.reference import diagnostics as reference
from longattn.reference.dense import attention_weights
from random_arrays import DTYPES, normal


def sample(rng, steps=12, layers=3, heads=4, best=None):
    tokens = rng.integers(0, 9, 40)
    emitted = rng.integers(0, 9, steps)
    shape = (steps, layers, heads) if best is None else (steps, layers, heads, best)
    return rng.integers(-1, 40, shape), tokens, emitted, (10, 19)


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("best", [None, 1, 3])
def test_scores_are_those_of_sets(rng, best, unique):
    args = sample(rng, best=best)
    got = retrieval_head_score(*args, unique=unique)
    assert got.shape == (3, 4)
    np.testing.assert_allclose(got, reference.retrieval_head_score(*args, unique=unique))


def test_a_head_that_copies_scores_one(rng):
    tokens = np.arange(40)
    top = np.arange(10, 19)[:, None, None]
    assert retrieval_head_score(top, tokens, tokens[10:19], (10, 19)) == 1
    assert retrieval_head_score(top, tokens, tokens[10:19], (10, 19), unique=False) == 1
    repeated = np.concatenate([top, top[:3]])
    emitted = np.concatenate([tokens[10:19], tokens[10:13]])
    assert retrieval_head_score(repeated, tokens, emitted, (10, 19)) == 1
    assert retrieval_head_score(repeated, tokens, emitted, (10, 19), unique=False) == 12 / 9


def test_a_head_that_looks_elsewhere_scores_zero(rng):
    top, tokens, emitted, needle = sample(rng)
    top[(top >= 10) & (top < 19)] = 3
    assert not retrieval_head_score(top, tokens, emitted, needle).any()


def test_scores_lie_between_zero_and_one(rng):
    for _ in range(20):
        score = retrieval_head_score(*sample(rng, steps=100))
        assert (score >= 0).all() and (score <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [2, 6])
def test_keys_are_those_of_explicit_weights(rng, isa, heads, dtype):
    q, k = normal(rng, (heads, 7, 16), dtype, spread=3.0), normal(rng, (2, 50, 16), dtype)
    p = attention_weights(q, k, range(7), causal=True)
    got = top_keys(q, k)
    assert got.shape == (7, heads)
    np.testing.assert_array_equal(got, p.argmax(axis=-1).T)
    best = top_keys(q, k, count=3)
    np.testing.assert_array_equal(best, np.argsort(-p, axis=-1)[..., :3].swapaxes(0, 1))
    np.testing.assert_array_equal(best[..., 0], got)


def test_rows_that_see_few_keys(rng):
    q, k = normal(rng, (2, 3, 8)), normal(rng, (2, 3, 8))
    best = top_keys(q, k, count=5)
    assert best.shape == (3, 2, 5)
    assert ((best >= 0).sum(axis=-1) == [[1, 1], [2, 2], [3, 3]]).all()


def test_a_copying_head_is_found(rng):
    """Keys and queries of one head spell out the tokens; the other is random."""
    tokens = rng.permutation(60)
    codes = normal(rng, (60, 32))
    k = np.stack([codes[tokens], normal(rng, (60, 32))])
    answer = tokens[20:30]
    q = np.stack([8 * codes[answer], normal(rng, (10, 32))])
    score = retrieval_head_score(top_keys(q, k, causal=False)[:, None], tokens, answer, (20, 30))
    assert score[0, 0] == 1 and score[0, 1] < 0.5


def test_means_over_samples(rng):
    scores = RetrievalScores(2, 3)
    assert not scores.scores.any()
    for one in ([[0, 0.2, 0.1], [1, 0, 0]], [[0, 0.2, 0], [0.5, 0, 0]]):
        scores.add(np.array(one))
    np.testing.assert_allclose(scores.scores, [[0, 0.2, 0.05], [0.75, 0, 0]])
    assert scores.heads() == [(1, 0), (0, 1)] and scores.samples == 2
    assert scores.heads(0.5) == [(1, 0)]


def test_masked_heads(rng):
    out = normal(rng, (2, 4, 3, 8))
    masked = mask_heads(out, [1, 3])
    assert not masked[:, [1, 3]].any()
    np.testing.assert_array_equal(masked[:, [0, 2]], out[:, [0, 2]])
    assert out.all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t, x, y, n: retrieval_head_score(t[:3], x, y, n), ValueError, r"top: got shape \(3, 3, 4\)"),
        (lambda t, x, y, n: retrieval_head_score(t + 0.5, x, y, n), TypeError, "top: got dtype float64"),
        (lambda t, x, y, n: retrieval_head_score(t, x, y, (5, 5)), ValueError, "needle: got 5, expected 6 to 40"),
        (lambda t, x, y, n: retrieval_head_score(t, x, y, 5), TypeError, "needle: got 5, expected a pair"),
        (lambda t, x, y, n: retrieval_head_score(t + 40, x, y, n), ValueError, "expected keys below 40"),
        (lambda t, x, y, n: retrieval_head_score(t, x[None], y, n), ValueError, "tokens, emitted: got shapes"),
        (lambda t, x, y, n: RetrievalScores(0, 2), ValueError, "layers: got 0"),
        (lambda t, x, y, n: RetrievalScores(2, 2).add(np.ones(2)), ValueError, "scores: got shape"),
        (lambda t, x, y, n: RetrievalScores(1, 1).add(np.array([[np.nan]])), ValueError, "scores: got numbers"),
        (lambda t, x, y, n: mask_heads(np.ones((2, 3, 4)), [2]), ValueError, "heads: got 2, expected 0 to 1"),
        (lambda t, x, y, n: top_keys(np.ones((2, 3, 4)), np.ones((2, 3, 4)), count=0), ValueError, "count: got 0"),
    ],
)
def test_bad_input(rng, call, error, message):
    with pytest.raises(error, match=message):
        call(*sample(rng))
