"""`embedding_free_attention`: pooled keys that are their own values."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import embedding_free_attention
from longattn.vision.embedding_free_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


@pytest.mark.parametrize(("h", "w", "r"), [(6, 8, 2), (7, 5, 3), (1, 1, 1), (5, 5, 5), (6, 6, 1)])
def test_reference(rng, isa, h, w, r):
    x = normal(rng, (2, h, w, 12))
    check(METHOD, x, weights(rng, 12, 12, True), heads=3, reduction=r, wo=weights(rng, 12, 5, True))


def test_kinds(rng):
    check_kinds(METHOD, normal(rng, (2, 6, 7, 12)), weights(rng, 12, 12), heads=2, reduction=2)


def test_without_pooling_it_is_attention(rng):
    x = normal(rng, (2, 4, 5, 12))
    rows = x.reshape(2, 20, 3, 4).swapaxes(1, 2)
    expected = la.attention(rows, rows, rows).swapaxes(1, 2).reshape(x.shape)
    same(METHOD, embedding_free_attention(x, heads=3), expected, x, heads=3)


def test_one_cell(rng):
    x = normal(rng, (2, 4, 4, 12))
    expected = np.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape)
    same(METHOD, embedding_free_attention(x, heads=3, reduction=4), expected, x, heads=3, reduction=4)


def test_the_reduction_of_training(rng):
    """Weights know nothing of the reduction: cells of 2 of an image are cells of 1 of its means."""
    x, ws = normal(rng, (1, 6, 6, 8)), weights(rng, 8, 8)
    means = np.repeat(np.repeat(x.reshape(1, 3, 2, 3, 2, 8).mean(axis=(2, 4)), 2, axis=1), 2, axis=2)
    out, again = (embedding_free_attention(a, ws, heads=2, reduction=2) for a in (x, x.copy()))
    np.testing.assert_array_equal(out, again)
    fine = embedding_free_attention(means, ws, heads=2, reduction=1)
    same(METHOD, fine, embedding_free_attention(means, ws, heads=2, reduction=2), means, ws, heads=2, reduction=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 12), F32)}, ValueError, r"x: got shape \(2, 12\)"),
        ({"heads": 5}, ValueError, r"heads: got 5"),
        ({"reduction": 5}, ValueError, r"reduction: got 5, expected 1 to 4"),
        ({"ws": np.zeros((12, 6), F32)}, ValueError, r"ws: got shape \(12, 6\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    raises(METHOD, error, message, {"x": normal(rng, (1, 4, 6, 12)), "heads": 3}, **change)
