"""`attention_distances`."""

import numpy as np
import pytest

from longattn.diagnostics import attention_distances
from longattn.reference import diagnostics as reference
from random_arrays import DTYPES, LAYOUTS, normal


def check(q, k, rows, **options):
    found = attention_distances(q, k, rows, **options)
    expected = reference.attention_distances(q, k, rows, **options)
    n = len(expected["pairs"])
    np.testing.assert_array_equal(found.pairs[:n], expected["pairs"])
    assert not found.pairs[n:].any() and not found.means[..., n:].any()
    np.testing.assert_allclose(found.means[..., :n], expected["means"], rtol=1e-4, atol=1e-7)
    for name in ("constant", "local", "distance"):
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.shares.sum(axis=-1), 1, rtol=1e-6)
    return found


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"size": (5, 8)}], ids=str)
@pytest.mark.parametrize("rows", [[0], [3, -1, 17, 3], list(range(40))])
def test_reference(rng, isa, options, rows):
    check(normal(rng, (2, 4, 40, 8)), normal(rng, (2, 2, 40, 8)), rows, **options)


def test_queries_are_those_of_the_last_keys(rng):
    check(normal(rng, (4, 10, 8)), normal(rng, (4, 30, 8)), [0, 9], causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, dtype, layout):
    q, k = (normal(rng, (2, 2, 30, 8), dtype, layout) for _ in "qk")
    check(q, k, [5, 29])


def test_more_rows_than_are_held_at_once(rng):
    check(normal(rng, (1, 150, 8)), normal(rng, (1, 150, 8)), list(range(150)), size=(10, 15))


@pytest.mark.parametrize("size", [None, (6, 5)])
def test_weights_without_scores_know_no_distance(size):
    nothing = np.zeros((2, 30, 4), np.float32)
    found = attention_distances(nothing, nothing, range(30), size=size)
    np.testing.assert_allclose(found.constant, 1 / 30, rtol=1e-6)
    np.testing.assert_allclose(found.local, 0, atol=1e-6)


def test_a_window_is_local(rng):
    """Nothing is left of keys beyond it, and so no constant."""
    q, k = (normal(rng, (2, 40, 8)) for _ in "qk")
    found = attention_distances(q, k, range(40), window=(3, 3))
    np.testing.assert_allclose(found.local, 1)
    assert not found.means[:, 4:].any() and (found.distance <= 3).all()


def test_a_bias_by_distance_is_found_again():
    """Of slope 1: a key `d` away weighs `e^-d` times the key at the query, but for rows near the ends."""
    nothing = np.zeros((1, 400, 4), np.float32)
    found = attention_distances(nothing, nothing, range(100, 300), alibi_slopes=np.ones(1, np.float32))
    np.testing.assert_allclose(found.means[0, 1:8] / found.means[0, :7], np.exp(-1), rtol=1e-5)


def test_wrong_arguments(rng):
    q = normal(rng, (2, 30, 8))
    for arguments, options, error, message in (
        ((q[0], q[0], [0]), {}, ValueError, "q, k: got shapes"),
        ((q, q[:, :0], [0]), {}, ValueError, "k: got shape"),
        ((q, q, []), {}, ValueError, "rows: got"),
        ((q, q, [0.5]), {}, ValueError, "rows: got float64"),
        ((q, q, [30]), {}, ValueError, "rows: got"),
        ((q, q, [0]), {"size": (5, 5)}, ValueError, "size: got 5 x 5"),
        ((q, q, [0]), {"size": 30}, TypeError, "size: got 30"),
        ((q.astype(int), q, [0]), {}, TypeError, "q: got dtype"),
    ):
        with pytest.raises(error, match=message):
            attention_distances(*arguments, **options)
