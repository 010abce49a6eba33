"""`blended_softmax_linear_attention`."""

import numpy as np
import pytest

import linear_checks
import longattn as la
import tolerances
from longattn.linear import FeatureMap, blended_softmax_linear_attention, key_statistics, read_statistics
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, normal, qkv


def bound(r, **fixed):
    """The method and its reference with a share that is given."""

    def with_share(function):
        return lambda q, k, v, **options: function(q, k, v, r, **fixed, **options)

    return with_share(blended_softmax_linear_attention), with_share(reference.blended_softmax_linear_attention)


@pytest.mark.parametrize("r", [0, 0.3, 1])
def test_reference(rng, isa, r):
    phi = FeatureMap(kind="softmax_pair", projection=normal(rng, (9, 20)))
    call, oracle = bound(r, phi=phi)
    for rows, keys in linear_checks.LENGTHS:
        q, k, v = qkv(rng, batch=2, rows=rows, keys=keys, dim=20, value_dim=37)
        linear_checks.compare(call, oracle, q, k, v, most=40 * np.abs(v).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    q, k, v = qkv(rng, rows=40, keys=90, q_dtype=dtype)
    linear_checks.compare(*bound(0.0), q, k, v)
    call, oracle = bound(0.4)
    roundoff = 3 * tolerances.ROUNDOFF[np.dtype(dtype)][0] * np.abs(np.asarray(v, np.float64)).max()
    np.testing.assert_allclose(call(q, k, v).astype(np.float64), oracle(q, k, v), rtol=1e-4, atol=roundoff + 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    linear_checks.laid(rng, *bound(0.3), layout, most=40)


def test_bad_input(rng):
    linear_checks.refused(bound(0.5)[0], *qkv(rng))
    q, k, v = qkv(rng)
    for r in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="r: got"):
            blended_softmax_linear_attention(q, k, v, r)
    with pytest.raises(ValueError, match="r: got shape"):
        blended_softmax_linear_attention(q, k, v, np.ones(2, np.float32))


# Identities


def test_r_1_is_softmax_attention(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    np.testing.assert_array_equal(blended_softmax_linear_attention(q, k, v, 1), la.attention(q, k, v))


def test_r_0_is_linear_attention(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    linear = read_statistics(q, key_statistics(k, v, phi="softmax"))
    np.testing.assert_array_equal(blended_softmax_linear_attention(q, k, v, np.zeros((), np.float32)), linear)


def test_affine_in_r(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    none, half, all_ = (blended_softmax_linear_attention(q, k, v, r) for r in (0.0, 0.5, 1.0))
    tolerances.check_linear(half, (none.astype(np.float64) + all_) / 2, 4 * np.abs(v).max(), 10)
