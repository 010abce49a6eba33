"""`performer_attention`."""

import numpy as np
import pytest

import linear_checks
import longattn as la
import tolerances
from longattn.linear import performer_attention, random_directions
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, qkv


def bound(dim=16, features=64, **fixed):
    """The method and its reference with directions that are given."""
    w = random_directions(features, dim, seed=3)

    def with_directions(function):
        return lambda q, k, v, **options: function(q, k, v, w, **fixed, **options)

    return with_directions(performer_attention), with_directions(reference.performer_attention)


def size(v):
    """An exponent of some tens errs by `U` of that, and with it the weight."""
    return 200 * np.abs(np.asarray(v, np.float64)).max(initial=0)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("features", [5, 64])
def test_reference(rng, isa, kernel, features):
    call, oracle = bound(20, features, kernel=kernel)
    for rows, keys in linear_checks.LENGTHS:
        q, k, v = qkv(rng, batch=2, rows=rows, keys=keys, dim=20, value_dim=37)
        linear_checks.compare(call, oracle, q, k, v, most=size(v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    linear_checks.storage(rng, *bound(), dtype, most=400)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    call, _ = bound()
    q, k, v = qkv(rng, rows=40, keys=90, layout=layout)
    copies = (np.ascontiguousarray(x) for x in (q, k, v))
    np.testing.assert_array_equal(call(q, k, v), call(*copies))


def test_masks(rng):
    call, oracle = bound()
    q, k, v = qkv(rng, batch=2, rows=20, keys=50)
    keep = rng.random((2, 50)) < 0.6
    expected = linear_checks.compare(call, oracle, q, k, v, mask=keep, most=size(v))
    k[0, :, ~keep[0]] = 100
    np.testing.assert_array_equal(call(q, k, v, mask=keep), expected)


def test_threads(rng, threads):
    linear_checks.bits(rng, bound()[0], threads)


def test_large_inputs_do_not_overflow(rng):
    call, _ = bound()
    q, k, v = qkv(rng, rows=40, keys=900)
    out = call(30 * q, 30 * k, v)
    assert np.isfinite(out).all()


def test_bad_input(rng):
    call, _ = bound()
    linear_checks.refused(call, *qkv(rng))
    q, k, v = qkv(rng)
    with pytest.raises(ValueError, match="projection: got shape"):
        performer_attention(q, k, v, np.ones((4, 15), np.float32))
    with pytest.raises(ValueError, match="kernel: got 'cos'"):
        call(q, k, v, kernel="cos")
    with pytest.raises(ValueError, match="scale: got -1"):
        call(q, k, v, scale=-1.0)
    with pytest.raises(ValueError, match="features: got 0"):
        random_directions(0, 4, seed=0)


# Identities


def test_more_features_come_nearer_to_softmax(rng):
    q, k, v = qkv(rng, rows=50, keys=60)
    q, k = q / 2, k / 2
    exact = la.attention(q, k, v)
    errors = [
        np.mean(
            [np.abs(performer_attention(q, k, v, random_directions(n, 16, seed=s)) - exact).mean() for s in range(5)]
        )
        for n in (16, 128, 1024)
    ]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]


def test_a_shift_of_the_exponents_of_keys(rng):
    """Keys that are longer by one more channel, which no feature sees, have smaller exponents, all alike."""
    q, k, v = (np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1))) for x in qkv(rng, rows=20, keys=30))
    w = np.pad(random_directions(32, 16, seed=1), ((0, 0), (0, 1)))
    out = performer_attention(q, k, v, w)
    k[..., -1] = 3
    tolerances.check_linear(performer_attention(q, k, v, w), out, size(v), 100)


def test_equal_values(rng):
    q, k, v = qkv(rng, heads=2, rows=20, keys=30)
    v[:] = v[:, :, :1]
    out = bound()[0](q, k, v)
    tolerances.check_linear(out, np.broadcast_to(v[:, :, :1], out.shape), 8 * np.abs(v).max(), 60)


def test_directions_are_orthogonal(rng):
    w = random_directions(40, 16, seed=2)
    assert w.shape == (40, 16) and w.dtype == np.float32
    for block in (w[:16], w[16:32], w[32:]):
        product = block.astype(np.float64) @ block.T
        np.testing.assert_allclose(product - np.diag(np.diag(product)), 0, atol=1e-5)
    assert 0.8 < (random_directions(2000, 16, seed=0).astype(np.float64) ** 2).mean() < 1.2
