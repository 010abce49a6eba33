"""`score_rank`."""

import numpy as np
import pytest

from longattn.diagnostics import score_rank
from longattn.reference import diagnostics as reference
from random_arrays import DTYPES, normal


def check(q, k, **options):
    found = score_rank(q, k, **options)
    values, rank, effective = reference.score_rank(q, k, **options)
    n = found.singular_values.shape[-1]
    assert n == min(q.shape[-2], k.shape[-2], q.shape[-1])
    largest = values[..., :1].max()
    np.testing.assert_allclose(found.singular_values, values[..., :n], rtol=1e-9, atol=1e-12 * largest)
    np.testing.assert_array_equal(found.rank, rank)
    np.testing.assert_allclose(found.effective, effective, rtol=1e-9)
    return found


@pytest.mark.parametrize("rows, keys, dim", [(30, 50, 8), (5, 50, 8), (50, 3, 8), (1, 1, 1), (8, 8, 8)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_reference(rng, rows, keys, dim, heads):
    check(rng.standard_normal((2, heads[0], rows, dim)), rng.standard_normal((2, heads[1], keys, dim)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    check(normal(rng, (3, 20, 6), dtype), normal(rng, (3, 30, 6), dtype))


def test_the_rank_is_at_most_the_width_of_heads(rng):
    """Of the form that weights make of inputs of 64 channels."""
    for dim in (1, 16, 64):
        found = check(rng.standard_normal((4, 64, dim)), rng.standard_normal((4, 64, dim)))
        np.testing.assert_array_equal(found.rank, dim)
        assert (found.effective <= dim).all()


def test_orthogonal_rows_use_every_direction(rng):
    q, k = (np.linalg.qr(rng.standard_normal((2, 40, 10)))[0] for _ in "qk")
    np.testing.assert_allclose(check(3 * q, k).effective, 10, rtol=1e-12)


def test_one_direction(rng):
    q = rng.standard_normal((2, 40, 1)) * rng.standard_normal((2, 1, 10))
    found = score_rank(q, rng.standard_normal((2, 30, 10)))
    np.testing.assert_array_equal(found.rank, 1)
    np.testing.assert_allclose(found.effective, 1, rtol=1e-10)


def test_another_basis_changes_nothing(rng):
    q, k, basis = rng.standard_normal((2, 40, 10)), rng.standard_normal((2, 30, 10)), rng.standard_normal((10, 10))
    one, two = score_rank(q, k), score_rank(q @ basis, k @ np.linalg.inv(basis).T)
    np.testing.assert_allclose(two.singular_values, one.singular_values, rtol=1e-8)


def test_weights_of_attention(rng):
    """Beside the unit matrix the rows are the matrix itself."""
    weights = rng.random((2, 20, 30))
    found = score_rank(weights, np.broadcast_to(np.eye(30), (2, 30, 30)))
    np.testing.assert_allclose(found.singular_values, np.linalg.svd(weights, compute_uv=False), rtol=1e-10)


def test_tolerance_and_zeros():
    q = np.diag([1.0, 1e-3, 1e-9])[None]
    k = np.eye(3)[None]
    assert [score_rank(q, k, tolerance=t).rank[0] for t in (0.0, 1e-6, 1e-2)] == [3, 2, 1]
    nothing = score_rank(0 * q, k)
    assert nothing.rank[0] == 0 and nothing.effective[0] == 0


def test_wrong_arguments(rng):
    q = rng.standard_normal((4, 20, 6))
    for arguments, options, error, message in (
        ((q[0], q), {}, ValueError, "q: got shape"),
        ((q, q[:3]), {}, ValueError, "k: got shape"),
        ((q, q[..., 1:]), {}, ValueError, "k: got shape"),
        ((q, q[:, :0]), {}, ValueError, "k: got shape"),
        ((q.astype(int), q), {}, TypeError, "q: got dtype"),
        ((q, q * np.inf), {}, ValueError, "k: got numbers that are not finite"),
        ((q, q), {"tolerance": 1.0}, ValueError, "tolerance: got 1.0"),
        ((q, q), {"tolerance": "no"}, TypeError, "tolerance: got 'no'"),
    ):
        with pytest.raises(error, match=message):
            score_rank(*arguments, **options)
