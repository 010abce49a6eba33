"""`l2vit_linear_attention`."""

import numpy as np
import pytest

import linear_checks
import tolerances
from longattn.linear import l2vit_linear_attention, simplified_linear_attention
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, normal, qkv

oracle = reference.l2vit_linear_attention


@pytest.mark.parametrize("den_min", [0.0, 1.0, 100.0])
def test_reference(rng, isa, den_min):
    linear_checks.across(rng, l2vit_linear_attention, oracle, den_min=den_min, tau=normal(rng, (4,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    linear_checks.storage(rng, l2vit_linear_attention, oracle, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    linear_checks.laid(rng, l2vit_linear_attention, oracle, layout)


def test_masks(rng):
    linear_checks.masked(rng, l2vit_linear_attention, oracle)


def test_threads(rng, threads):
    linear_checks.bits(rng, l2vit_linear_attention, threads)


def test_bad_input(rng):
    linear_checks.refused(l2vit_linear_attention, *qkv(rng))
    q, k, v = qkv(rng)
    with pytest.raises(ValueError, match="den_min: got -1"):
        l2vit_linear_attention(q, k, v, den_min=-1)
    with pytest.raises(ValueError, match="tau: got shape"):
        l2vit_linear_attention(q, k, v, tau=np.ones(3, np.float32))


# Identities


def test_without_a_bound_it_is_relu_attention(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    out = l2vit_linear_attention(q, k, v, den_min=0.0, tau=np.ones(4, np.float32))
    np.testing.assert_array_equal(out, simplified_linear_attention(q, k, v, eps=0.0))


def test_below_the_bound_it_is_linear_in_the_query(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    out = l2vit_linear_attention(q, k, v, den_min=1e6)
    np.testing.assert_array_equal(l2vit_linear_attention(2 * q, k, v, den_min=1e6), 2 * out)


def test_the_other_order_of_products(rng):
    q, k, v = qkv(rng, heads=2, rows=20, keys=30)
    weights = np.maximum(q.astype(np.float64), 0) @ np.maximum(k, 0).swapaxes(-1, -2)
    other = 0.25 * (weights / np.maximum(weights.sum(axis=-1, keepdims=True), 100)) @ v
    tolerances.check_linear(l2vit_linear_attention(q, k, v), other, np.abs(v).max(), 60)


def test_tau_multiplies_the_output(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    tau = np.array([1, 2, 4, 8], np.float32)
    one = l2vit_linear_attention(q, k, v, tau=np.ones(4, np.float32))
    np.testing.assert_array_equal(l2vit_linear_attention(q, k, v, tau=tau), tau[:, None, None] * one)
