"""`linear_match_attention`, matches and their places."""

import numpy as np
import pytest

import linear_checks
import tolerances
from longattn.linear import dual_softmax_matches, linear_match_attention, refine_matches
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, normal, qkv

oracle = reference.linear_match_attention


def test_reference(rng, isa):
    linear_checks.across(rng, linear_match_attention, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    linear_checks.storage(rng, linear_match_attention, oracle, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    linear_checks.laid(rng, linear_match_attention, oracle, layout)


def test_masks(rng):
    linear_checks.masked(rng, linear_match_attention, oracle)
    q, k, v = qkv(rng, batch=2, rows=20, keys=50)
    kept = rng.random((2, 20)) < 0.5
    out = linear_checks.compare(linear_match_attention, oracle, q, k, v, q_mask=kept)
    assert not out.swapaxes(1, 2)[~kept].any() and out.swapaxes(1, 2)[kept].all()


def test_threads(rng, threads):
    linear_checks.bits(rng, linear_match_attention, threads)


@pytest.mark.parametrize("lengths", [(1, 1), (7, 5), (300, 40), (600, 530)])
def test_matches(rng, lengths):
    """Features that are noisy copies of each other, and some without a partner."""
    b = normal(rng, (lengths[1], 32), spread=2.0)
    a = b[rng.permutation(max(lengths))[: lengths[0]] % lengths[1]] + normal(rng, (lengths[0], 32), spread=0.3)
    confidence = reference.dual_softmax(a, b)
    pairs, found = dual_softmax_matches(a, b)
    best = (confidence == confidence.max(axis=1, keepdims=True)) & (confidence == confidence.max(axis=0, keepdims=True))
    expected = np.argwhere(best & (confidence > 0.2))
    np.testing.assert_array_equal(pairs, expected)
    np.testing.assert_allclose(found, confidence[tuple(expected.T)], rtol=1e-4)


def test_borders(rng):
    a = normal(rng, (48, 32), spread=3.0)
    every, _ = dual_softmax_matches(a, a)
    inner, _ = dual_softmax_matches(a, a, a_size=(6, 8), b_size=(6, 8))
    kept = [n for n in every[:, 0] if 2 <= n // 8 < 4 and 2 <= n % 8 < 6]
    np.testing.assert_array_equal(inner[:, 0], kept)
    assert len(kept) == 8


def test_bad_input(rng):
    linear_checks.refused(linear_match_attention, *qkv(rng))
    a = normal(rng, (4, 8))
    for call, match in (
        (lambda: dual_softmax_matches(a, a[:, 1:]), "b: got shape"),
        (lambda: dual_softmax_matches(a, a, temperature=0.0), "temperature: got 0"),
        (lambda: dual_softmax_matches(a, a, a_size=(2, 3)), "a_size: got 2 x 3"),
        (lambda: refine_matches(a[None], a[None]), "window_a: got 4 features"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# Identities


def test_blocks_do_not_matter(rng):
    q, k, v = qkv(rng, rows=20, keys=3000)
    order = rng.permutation(3000)
    out = linear_match_attention(q, k, v)
    tolerances.check_linear(linear_match_attention(q, k[:, :, order], v[:, :, order]), out, 4 * np.abs(v).max(), 3000)


def test_one_key(rng):
    q, k, v = qkv(rng, heads=2, rows=5, keys=1)
    mapped = [np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))).astype(np.float64) for x in (q, k)]
    z = mapped[0] @ mapped[1].swapaxes(-1, -2)
    tolerances.check_linear(linear_match_attention(q, k, v, eps=0.5), v * (z / (z + 0.5)), np.abs(v).max(), 20)


def test_the_confidence_of_two_single_features(rng):
    pairs, found = dual_softmax_matches(normal(rng, (1, 8)), normal(rng, (1, 8)))
    np.testing.assert_array_equal(pairs, [[0, 0]])
    np.testing.assert_allclose(found, [1], rtol=1e-6)


def test_confidences_are_at_most_either_softmax(rng):
    a, b = normal(rng, (30, 8)), normal(rng, (40, 8))
    pairs, found = dual_softmax_matches(a, b, threshold=0.0)
    scores = a.astype(np.float64) @ b.T / 0.8
    rows, columns = (np.exp(scores) / np.exp(scores).sum(axis=axis, keepdims=True) for axis in (1, 0))
    at = tuple(pairs.T)
    assert len(pairs) and (found <= (1 + 1e-5) * np.minimum(rows[at], columns[at])).all()


def test_a_one_hot_window(rng):
    """The middle of the first map meets one place of the second."""
    a, b = np.zeros((25, 25, 8), np.float32), np.zeros((25, 25, 8), np.float32)
    a[:, 12, 0] = 100
    b[np.arange(25), np.arange(25), 0] = 100
    place, spread = refine_matches(a, b)
    y, x = np.divmod(np.arange(25), 5)
    np.testing.assert_allclose(place, np.stack([x / 2 - 1, y / 2 - 1], axis=1), atol=1e-6)
    np.testing.assert_allclose(spread, 0, atol=1e-3)
