"""`simplified_linear_attention` and `rep_batch_norm`."""

import numpy as np
import pytest

import linear_checks
import tolerances
from longattn.linear import fold_rep_batch_norm, rep_batch_norm, simplified_linear_attention
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, normal, qkv

oracle = reference.simplified_linear_attention


def test_reference(rng, isa):
    linear_checks.across(rng, simplified_linear_attention, oracle)


def test_positions(rng):
    q, k, v = qkv(rng, rows=40, keys=40)
    linear_checks.compare(simplified_linear_attention, oracle, q, k, v, pos=normal(rng, (40, 32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    linear_checks.storage(rng, simplified_linear_attention, oracle, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    linear_checks.laid(rng, simplified_linear_attention, oracle, layout)


def test_masks(rng):
    linear_checks.masked(rng, simplified_linear_attention, oracle)


def test_threads(rng, threads):
    linear_checks.bits(rng, simplified_linear_attention, threads)


def test_convolution(rng):
    q, k, v = qkv(rng, batch=2, heads=2, rows=35, keys=35, layout="blhd")
    weight, bias = normal(rng, (16, 1, 5, 5)), normal(rng, (16,))
    most = 4 * np.abs(v).max() * np.abs(weight).sum(axis=(1, 2, 3)).max() + np.abs(bias).max()
    options = {"dwc_weight": weight, "dwc_bias": bias, "size": (5, 7)}
    linear_checks.compare(simplified_linear_attention, oracle, q, k, v, most=most, **options)


def test_bad_input(rng):
    linear_checks.refused(simplified_linear_attention, *qkv(rng))
    q, k, v = qkv(rng)
    with pytest.raises(ValueError, match="eps: got nan"):
        simplified_linear_attention(q, k, v, eps=float("nan"))
    x, c = normal(rng, (3, 8)), np.ones(8, np.float32)
    with pytest.raises(ValueError, match="var: got a negative"):
        rep_batch_norm(x, c, -c, c, c)
    with pytest.raises(ValueError, match="blend: got 2"):
        rep_batch_norm(x, c, c, c, c, blend=2.0)
    with pytest.raises(ValueError, match="gamma: got shape"):
        rep_batch_norm(x, c, c, c[1:], c)


def statistics(rng):
    return normal(rng, (8,)), rng.random(8, np.float32), normal(rng, (8,)), normal(rng, (8,))


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_rep_batch_norm(rng, blend):
    x, given = normal(rng, (2, 5, 8)), statistics(rng)
    options = {"alpha": 0.7, "blend": blend, "layer_gamma": normal(rng, (8,)), "layer_beta": normal(rng, (8,))}
    expected = reference.rep_batch_norm(x, *given, **options)
    tolerances.check_linear(rep_batch_norm(x, *given, **options), expected, 40 + 40 * np.abs(expected), 20)


# Identities


def test_the_other_order_of_products(rng):
    q, k, v = qkv(rng, heads=2, rows=20, keys=30)
    weights = np.maximum(q.astype(np.float64), 0) @ np.maximum(k, 0).swapaxes(-1, -2)
    other = (weights @ v) / (weights.sum(axis=-1, keepdims=True) + 1e-6)
    tolerances.check_linear(simplified_linear_attention(q, k, v), other, 4 * np.abs(v).max(), 60)


def test_the_blend_has_two_ends(rng):
    x, (mean, var, gamma, beta) = normal(rng, (5, 8)), statistics(rng)
    wide = x.astype(np.float64)
    layer = (wide - wide.mean(axis=-1, keepdims=True)) / np.sqrt(wide.var(axis=-1, keepdims=True) + 1e-5)
    tolerances.check_linear(rep_batch_norm(x, mean, var, gamma, beta, blend=1.0), layer, 40, 20)
    batch = (wide - mean) / np.sqrt(var.astype(np.float64) + 1e-5) * gamma + beta + wide
    tolerances.check_linear(rep_batch_norm(x, mean, var, gamma, beta), batch, 40 + 40 * np.abs(batch), 20)


def test_folding(rng):
    x, (mean, var, gamma, beta) = normal(rng, (5, 8)), statistics(rng)
    factor, shift = fold_rep_batch_norm(mean, var, gamma, beta, alpha=0.5)
    batch = (x - mean.astype(np.float64)) / np.sqrt(var.astype(np.float64) + 1e-5) * gamma + beta
    tolerances.check_linear(factor * x + shift, batch + 0.5 * x.astype(np.float64), 40 + 40 * np.abs(batch), 20)


def test_rows_of_positive_inputs_sum_to_1(rng):
    q, k, _ = (np.abs(x) for x in qkv(rng, rows=20, keys=30))
    ones = np.ones((1, 2, 30, 4), np.float32)
    tolerances.check_linear(simplified_linear_attention(q, k, ones, eps=0.0), np.ones((1, 4, 20, 4)), 4, 60)


def test_features_that_do_not_meet(rng):
    """The attention part vanishes."""
    q, k, v = qkv(rng, rows=4, keys=30)
    q[..., 8:], k[..., :8] = -1, -1
    assert not simplified_linear_attention(q, k, v).any()
