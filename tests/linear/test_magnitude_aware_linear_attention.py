"""`magnitude_aware_linear_attention`."""

import numpy as np
import pytest

import linear_checks
import tolerances
from longattn.linear import magnitude_aware_linear_attention, rope_2d_angles
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, qkv

oracle = reference.magnitude_aware_linear_attention


def test_reference(rng, isa):
    linear_checks.across(rng, magnitude_aware_linear_attention, oracle)


@pytest.mark.parametrize("phi", ["relu", "exp", "softmax", "softmax_pair"])
def test_other_maps(rng, phi):
    q, k, v = qkv(rng, rows=20, keys=30)
    linear_checks.compare(magnitude_aware_linear_attention, oracle, q, k, v, phi=phi, scale=0.3, eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    linear_checks.storage(rng, magnitude_aware_linear_attention, oracle, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    linear_checks.laid(rng, magnitude_aware_linear_attention, oracle, layout)


def test_masks(rng):
    linear_checks.masked(rng, magnitude_aware_linear_attention, oracle)


def test_threads(rng, threads):
    linear_checks.bits(rng, magnitude_aware_linear_attention, threads)


def test_turns(rng):
    """Angles of a map; with them, rows need not sum to 1."""
    q, k, v = qkv(rng, rows=300, keys=300)
    angles = rope_2d_angles(15, 20, 16)
    assert angles.shape == (300, 8) and angles[20, 0] == 1 and not angles[20, 4:].any()
    linear_checks.compare(magnitude_aware_linear_attention, oracle, q, k, v, angles=angles, most=20 * np.abs(v).max())


def test_bad_input(rng):
    linear_checks.refused(magnitude_aware_linear_attention, *qkv(rng))
    q, k, v = qkv(rng)
    for options, match in (
        ({"phi": "cos"}, "phi: got 'cos'"),
        ({"scale": np.inf}, "scale: got inf"),
        ({"angles": np.zeros((37, 8), np.float32)}, "angles: got some with 5 queries"),
    ):
        with pytest.raises(ValueError, match=match):
            magnitude_aware_linear_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="angles: got shape"):
        magnitude_aware_linear_attention(
            q[..., :5, :], k[..., :5, :], v[..., :5, :], angles=np.zeros((5, 7), np.float32)
        )
    with pytest.raises(ValueError, match="dim: got 6"):
        rope_2d_angles(2, 2, 6)


# Identities


def test_rows_sum_to_1(rng):
    q, k, _ = qkv(rng, rows=20, keys=30)
    ones = np.ones((1, 2, 30, 4), np.float32)
    out = magnitude_aware_linear_attention(q, k, ones, eps=0.0)
    tolerances.check_linear(out, np.ones((1, 4, 20, 4)), 16, 60)


def test_equal_values(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    v[:] = v[:, :, :1]
    expected = np.repeat(np.broadcast_to(v[:, :, :1], (1, 2, 20, 16)), 2, axis=1)
    tolerances.check_linear(magnitude_aware_linear_attention(q, k, v, eps=0.0), expected, 16 * np.abs(v).max(), 60)


def test_longer_queries_are_sharper(rng):
    """Deviations from the uniform row grow affinely with a factor on the features."""
    q, k, _ = qkv(rng, heads=2, rows=20, keys=30)
    q, k = np.abs(q), np.abs(k)
    one_hot = np.broadcast_to(np.eye(30, dtype=np.float32), (1, 2, 30, 30))
    one, two, three = (
        magnitude_aware_linear_attention(a * q, k, one_hot, phi="relu", eps=0.0).astype(np.float64) - 1 / 30
        for a in (np.float32(1), np.float32(2), np.float32(3))
    )
    tolerances.check_linear(three - two, two - one, 4 * np.abs(three).max(), 60)
    assert np.abs(two - one).max() > 0.01


def test_the_factored_form_is_the_direct_one(rng):
    q, k, v = qkv(rng, heads=2, rows=20, keys=30)
    mapped = [np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))).astype(np.float64) for x in (q, k)]
    scores = 0.25 * mapped[0] @ mapped[1].swapaxes(-1, -2) / 30
    mean = scores.sum(axis=-1, keepdims=True)
    direct = ((1 + 1 / (mean + 1e-6)) * scores - mean / 30) @ v
    tolerances.check_linear(magnitude_aware_linear_attention(q, k, v), direct, 16 * np.abs(v).max(), 60)


def test_angles_of_zero_change_nothing(rng):
    q, k, v = qkv(rng, rows=30, keys=30)
    np.testing.assert_array_equal(
        magnitude_aware_linear_attention(q, k, v, angles=np.zeros((30, 8), np.float32)),
        magnitude_aware_linear_attention(q, k, v),
    )
