"""`efficient_attention`."""

import numpy as np
import pytest

import linear_checks
import tolerances
from longattn.linear import efficient_attention
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, normal, qkv

NORM = pytest.mark.parametrize("norm", ["softmax", "scaling"])
oracle = reference.efficient_attention


def size(q, k, v, norm):
    """Of the terms: of the scaling form, of products of either sign."""
    return None if norm == "softmax" else oracle(*(np.abs(np.asarray(x, np.float64)) for x in (q, k, v)), norm=norm)


@NORM
def test_reference(rng, isa, norm):
    for rows, keys in linear_checks.LENGTHS:
        q, k, v = qkv(rng, batch=2, rows=rows, keys=keys, dim=20, value_dim=37)
        linear_checks.compare(efficient_attention, oracle, q, k, v, norm=norm, most=size(q, k, v, norm))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    linear_checks.storage(rng, efficient_attention, oracle, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    linear_checks.laid(rng, efficient_attention, oracle, layout)


def test_masks(rng):
    linear_checks.masked(rng, efficient_attention, oracle)
    q, k, v = qkv(rng, rows=20, keys=50)
    keep = rng.random(50) < 0.5
    out = efficient_attention(q, k, v, norm="scaling", mask=keep)
    short = efficient_attention(q, k[:, :, keep], v[:, :, keep], norm="scaling")
    tolerances.check_linear(out, short, np.abs(v).sum() + 1, 60)


def test_threads(rng, threads):
    linear_checks.bits(rng, efficient_attention, threads)


def test_large_keys_do_not_overflow(rng):
    """Maxima that rise over the blocks, and channels of one huge number."""
    q, k, v = qkv(rng, rows=20, keys=1000)
    k *= np.linspace(1, 300, 1000, dtype=np.float32)[:, None]
    linear_checks.compare(efficient_attention, oracle, q, k, v, most=400 * np.abs(v).max())


def test_no_keys_and_no_queries(rng):
    q, k, v = qkv(rng, rows=3, keys=0)
    assert not efficient_attention(q, k, v).any()
    q, k, v = qkv(rng, rows=0, keys=3)
    assert efficient_attention(q, k, v).shape == (1, 4, 0, 16)


def test_bad_input(rng):
    linear_checks.refused(efficient_attention, *qkv(rng))
    q, k, v = qkv(rng)
    with pytest.raises(ValueError, match="norm: got 'none'"):
        efficient_attention(q, k, v, norm="none")
    with pytest.raises(TypeError, match="mask: got dtype"):
        efficient_attention(q, k, v, mask=np.ones(37))
    with pytest.raises(ValueError, match="mask: got shape"):
        efficient_attention(q, k, v, mask=np.ones(36, bool))


# Identities


def test_rows_are_shares(rng):
    """Values of one-hot rows return the weights."""
    q, k, _ = qkv(rng, rows=20, keys=30)
    v = np.broadcast_to(np.eye(30, dtype=np.float32), (1, 2, 30, 30))
    weights = efficient_attention(q, k, v)
    assert (weights >= 0).all()
    tolerances.check_linear(weights.sum(axis=-1), np.ones((1, 4, 20)), 4, 60)


def test_scaling_is_the_plain_product(rng):
    q, k, v = qkv(rng, heads=2, rows=20, keys=30)
    plain = q.astype(np.float64) @ k.swapaxes(-1, -2) @ v / 30
    most = np.abs(q).astype(np.float64) @ np.abs(k).swapaxes(-1, -2) @ np.abs(v) / 30
    tolerances.check_linear(efficient_attention(q, k, v, norm="scaling"), plain, most, 50)


def test_one_key_returns_its_value(rng):
    q, k, v = qkv(rng, heads=2, rows=5, keys=1)
    tolerances.check_linear(efficient_attention(q, k, v), np.broadcast_to(v, (1, 2, 5, 16)), 4 * np.abs(v).max(), 20)


def test_blocks_do_not_matter(rng):
    """Keys in another order fall into other blocks, and their maxima come at other times."""
    q, k, v = qkv(rng, rows=20, keys=3000)
    order = rng.permutation(3000)
    out = efficient_attention(q, k, v)
    tolerances.check_linear(efficient_attention(q, k[:, :, order], v[:, :, order]), out, 4 * np.abs(v).max(), 3000)


def test_a_shift_of_a_channel_changes_nothing(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    shift = normal(rng, (16,))
    out = efficient_attention(q, k, v)
    tolerances.check_linear(efficient_attention(q, k + shift, v), out, 16 * np.abs(v).max(), 50)
