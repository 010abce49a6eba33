"""`inline_attention`."""

import numpy as np
import pytest

import linear_checks
import tolerances
from longattn.linear import inline_attention, inline_local_weights
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, normal, qkv

oracle = reference.inline_attention


def spread(q, k, v):
    """What the terms come to, were all of them positive."""
    q, k, v = (np.abs(np.asarray(x, np.float64)) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = q.shape[-1] ** -0.5 * q @ k.swapaxes(-1, -2)
    return (scores.mean(axis=-1, keepdims=True) + 1) * v.max(initial=0) * 3


@pytest.mark.parametrize("phi", ["identity", "relu", "exp"])
def test_reference(rng, isa, phi):
    for rows, keys in linear_checks.LENGTHS:
        q, k, v = qkv(rng, batch=2, rows=rows, keys=keys, dim=20, value_dim=37)
        mapped = [np.exp(np.abs(x)) if phi == "exp" else x for x in (q, k)]
        linear_checks.compare(inline_attention, oracle, q, k, v, phi=phi, most=spread(*mapped, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    linear_checks.storage(rng, inline_attention, oracle, dtype, most=40)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    linear_checks.laid(rng, inline_attention, oracle, layout, phi="relu", scale=0.05)


def test_masks(rng):
    linear_checks.masked(rng, inline_attention, oracle, phi="relu", scale=0.05)


def test_threads(rng, threads):
    linear_checks.bits(rng, inline_attention, threads)


def test_local_residual(rng):
    """Each sample has its own filters; the class token is left out."""
    q, k, v = qkv(rng, batch=2, heads=2, rows=36, keys=36)
    x = normal(rng, (2, 35, 32))
    weights = inline_local_weights(x, normal(rng, (8, 16)), normal(rng, (32 * 9, 4)), groups=2)
    assert weights.shape == (2, 32, 3, 3)
    options = {"local_weights": weights, "size": (5, 7), "prefix_tokens": 1}
    most = spread(q, k, v).max() + 4 * np.abs(v).max() * np.abs(weights).sum(axis=(2, 3)).max()
    linear_checks.compare(inline_attention, oracle, q, k, v, most=most, **options)


def test_local_weights_of_one_group(rng):
    x, w1, w2 = normal(rng, (2, 5, 4)), normal(rng, (3, 4)), normal(rng, (36, 3))
    from math import erf

    inner = x.mean(axis=1, dtype=np.float64) @ w1.T.astype(np.float64)
    inner = np.array([[y * (1 + erf(y / 2**0.5)) / 2 for y in row] for row in inner])
    np.testing.assert_allclose(
        inline_local_weights(x, w1, w2), (inner @ w2.T).reshape(2, 4, 3, 3), rtol=1e-5, atol=1e-6
    )


def test_bad_input(rng):
    linear_checks.refused(inline_attention, *qkv(rng))
    q, k, v = qkv(rng, heads=2, rows=37)
    with pytest.raises(ValueError, match="prefix_tokens: got 38"):
        inline_attention(q, k, v, prefix_tokens=38)
    with pytest.raises(ValueError, match="size: got None"):
        inline_attention(q, k, v, local_weights=np.ones((1, 32, 3, 3), np.float32))
    with pytest.raises(ValueError, match="w2: got shape"):
        inline_local_weights(normal(rng, (2, 5, 4)), normal(rng, (3, 4)), normal(rng, (35, 3)))


# Identities


def test_rows_sum_to_1(rng):
    q, k, _ = qkv(rng, rows=20, keys=30)
    ones = np.ones((1, 2, 30, 4), np.float32)
    tolerances.check_linear(inline_attention(q, k, ones), np.ones((1, 4, 20, 4)), spread(q, k, ones), 60)


def test_the_factored_form_is_the_direct_one(rng):
    q, k, v = qkv(rng, heads=2, rows=20, keys=30)
    scores = 0.25 * q.astype(np.float64) @ k.swapaxes(-1, -2)
    direct = ((scores - scores.mean(axis=-1, keepdims=True) + 1) / 30) @ v
    tolerances.check_linear(inline_attention(q, k, v), direct, spread(q, k, v), 60)


def test_a_query_of_zeros_gives_the_mean(rng):
    q, k, v = qkv(rng, heads=2, rows=3, keys=30)
    expected = np.broadcast_to(v.astype(np.float64).mean(axis=2, keepdims=True), (1, 2, 3, 16))
    tolerances.check_linear(inline_attention(0 * q, k, v), expected, np.abs(v).max(), 60)


def test_the_double_of_a_query_has_another_row(rng):
    """Where dividing by the sum gives the same."""
    q, k, v = qkv(rng, rows=20, keys=30)
    assert np.abs(inline_attention(2 * q, k, v) - inline_attention(q, k, v)).max() > 0.1


def test_keys_with_mean_0(rng):
    q, k, v = qkv(rng, heads=2, rows=20, keys=30)
    k = k - k.mean(axis=2, keepdims=True)
    expected = 0.25 * q.astype(np.float64) @ k.swapaxes(-1, -2) @ v / 30 + v.mean(axis=2, keepdims=True)
    tolerances.check_linear(inline_attention(q, k, v), expected, 4 * spread(q, k, v), 60)
