"""Mahalanobis distances against the formula, and on vectors in and out of distribution."""

import numpy as np
import pytest

import longattn as la
from longattn import vectors
from random_arrays import DTYPES, F32, normal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_formula(rng, dtype):
    k, q = normal(rng, (2, 300, 6)).astype(dtype), normal(rng, (4, 5, 6)).astype(dtype)
    got = la.diagnostics.mahalanobis(q, k)
    assert got.shape == (4, 5) and got.dtype == np.float64
    for h in range(4):
        keys = k[h // 2].astype(np.float64)
        inverse = np.linalg.inv(np.cov(keys.T, bias=True))
        away = q[h].astype(np.float64) - keys.mean(0)
        np.testing.assert_allclose(got[h], np.sqrt(np.einsum("nd,de,ne->n", away, inverse, away)), rtol=1e-5)


def test_keys_are_near_and_queries_of_a_model_far():
    made = vectors.load("synthetic", length=4096, groups=4, heads=["0"], seed=0)
    of_keys = la.diagnostics.mahalanobis(made.keys, made.keys)
    np.testing.assert_allclose(np.sqrt((of_keys**2).mean()), 128**0.5, rtol=1e-3)
    of_queries = la.diagnostics.mahalanobis(np.ascontiguousarray(made.queries.swapaxes(0, 1)), made.keys)
    assert of_queries.mean() > 1.5 * of_keys.mean()


def test_what_keys_do_not_span_is_far(rng):
    k = normal(rng, (1, 50, 4))
    k[..., 3] = 1
    q = np.array([[[0, 0, 0, 1], [0, 0, 0, 2]]], F32)
    near, far = la.diagnostics.mahalanobis(q, k)[0]
    assert near < 3 and far > 500
    alike = np.ones_like(k)
    np.testing.assert_array_equal(la.diagnostics.mahalanobis(q, alike), [[np.inf, np.inf]])
    np.testing.assert_array_equal(la.diagnostics.mahalanobis(alike[:, :1], alike), [[0]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": np.ones((3, 2, 4), F32)}, ValueError, "q: got shape"),
        ({"q": np.ones((2, 2, 3), F32)}, ValueError, "q: got shape"),
        ({"q": np.ones((2, 2, 4), int)}, TypeError, "q: got dtype int64"),
        ({"q": np.full((2, 2, 4), np.nan, F32)}, ValueError, "q: got NaN"),
        ({"k": np.ones((2, 1, 4), F32)}, ValueError, "k: got shape"),
        ({"k": np.ones((2, 4), F32)}, ValueError, "k: got shape"),
        ({"ridge": 0.0}, ValueError, "ridge: got 0.0"),
    ],
)
def test_bad_arguments(rng, arguments, error, message):
    given = {"q": normal(rng, (2, 3, 4)), "k": normal(rng, (2, 9, 4)), **arguments}
    with pytest.raises(error, match=message):
        la.diagnostics.mahalanobis(**given)
