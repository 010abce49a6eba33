"""`fastmax_attention`."""

import math

import numpy as np
import pytest

import linear_checks
import longattn as la
import tolerances
from longattn.linear import fastmax_attention
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, qkv

oracle = reference.fastmax_attention
NORM = pytest.mark.parametrize("qk_norm", ["standardise", "maxnorm", "none"])


@NORM
def test_reference(rng, isa, qk_norm):
    linear_checks.across(rng, fastmax_attention, oracle, qk_norm=qk_norm)


@pytest.mark.parametrize("dim", [1, 7, 16, 33])
def test_dimensions(rng, isa, dim):
    q, k, v = qkv(rng, rows=20, keys=200, dim=dim, value_dim=5)
    linear_checks.compare(fastmax_attention, oracle, q, k, v, qk_norm="maxnorm")


def test_order_1(rng):
    """With scores below 1, denominators stay away from 0."""
    q, k, v = qkv(rng, rows=20, keys=60)
    linear_checks.compare(
        fastmax_attention, oracle, q, k, v, order=1, qk_norm="maxnorm", temperature=2.0, most=8 * np.abs(v).max()
    )


def test_coefficients_and_temperature(rng):
    q, k, v = qkv(rng, rows=20, keys=60)
    linear_checks.compare(
        fastmax_attention, oracle, q, k, v, coefficients=(2.0, 0.5, 0.25), temperature=3.0, most=8 * np.abs(v).max()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    linear_checks.storage(rng, fastmax_attention, oracle, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    linear_checks.laid(rng, fastmax_attention, oracle, layout)


def test_masks(rng):
    linear_checks.masked(rng, fastmax_attention, oracle)


def test_threads(rng, threads):
    linear_checks.bits(rng, fastmax_attention, threads)


def test_bad_input(rng):
    linear_checks.refused(fastmax_attention, *qkv(rng))
    q, k, v = qkv(rng)
    for options, match in (
        ({"order": 3}, "order: got 3"),
        ({"qk_norm": "most"}, "qk_norm: got 'most'"),
        ({"temperature": 0.0}, "temperature: got 0"),
        ({"coefficients": (1.0, 1.0)}, "coefficients: got"),
    ):
        with pytest.raises(ValueError, match=match):
            fastmax_attention(q, k, v, **options)


# Identities


def test_all_pairs(rng):
    q, k, v = qkv(rng, heads=2, rows=20, keys=30)
    s = q.astype(np.float64) @ k.swapaxes(-1, -2) / 4
    f = 1 + s + s * s / 2
    direct = f @ v / f.sum(axis=-1, keepdims=True)
    tolerances.check_linear(fastmax_attention(q, k, v, qk_norm="none"), direct, 8 * np.abs(v).max(), 200)


def test_blocks_do_not_matter(rng):
    q, k, v = qkv(rng, rows=20, keys=3000)
    order = rng.permutation(3000)
    out = fastmax_attention(q, k, v)
    tolerances.check_linear(fastmax_attention(q, k[:, :, order], v[:, :, order]), out, 8 * np.abs(v).max(), 3000)


def test_a_query_of_zeros_gives_the_mean(rng):
    q, k, v = qkv(rng, heads=2, rows=3, keys=30)
    expected = np.broadcast_to(v.astype(np.float64).mean(axis=2, keepdims=True), (1, 2, 3, 16))
    tolerances.check_linear(fastmax_attention(0 * q, k, v, qk_norm="none"), expected, np.abs(v).max(), 60)


@pytest.mark.parametrize("order", [1, 2])
def test_it_tends_to_softmax(rng, order):
    """Weights err by the rest of the series, relative to the smallest weight's exponential."""
    q, k, v = qkv(rng, rows=20, keys=30)
    q *= np.float32(0.05)
    out = fastmax_attention(q, k, v, order=order, qk_norm="none")
    s = np.abs(q @ np.repeat(k, 2, axis=1).swapaxes(-1, -2) / 4).max()
    rest = s ** (order + 1) / math.factorial(order + 1) * math.exp(2 * s)
    error = np.abs(out - la.attention(q, k, v)).max()
    assert error <= 2 * rest * np.abs(v).max() / (1 - rest)
    assert error > 1e-6
