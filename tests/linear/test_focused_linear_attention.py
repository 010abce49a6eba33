"""`focused_linear_attention`."""

import numpy as np
import pytest

import linear_checks
import tolerances
from longattn import _core
from longattn.linear import focused_linear_attention, simplified_linear_attention
from longattn.reference import linear as reference
from longattn.reference.linear.focused_linear_attention import focused
from random_arrays import DTYPES, LAYOUTS, normal, qkv

oracle = reference.focused_linear_attention
SCOPE = pytest.mark.parametrize("norm_scope", ["all", "head"])


@SCOPE
@pytest.mark.parametrize("power", [1.0, 3.0, 2.5])
def test_reference(rng, isa, norm_scope, power):
    linear_checks.across(rng, focused_linear_attention, oracle, norm_scope=norm_scope, power=power)


@SCOPE
def test_scales_and_positions(rng, norm_scope):
    q, k, v = qkv(rng, heads=2, rows=40, keys=40)
    options = {"channel_scale": normal(rng, (32,)), "pos": normal(rng, (40, 32)), "norm_scope": norm_scope}
    linear_checks.compare(focused_linear_attention, oracle, q, k, v, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    linear_checks.storage(rng, focused_linear_attention, oracle, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    linear_checks.laid(rng, focused_linear_attention, oracle, layout)


def test_threads(rng, threads):
    linear_checks.bits(rng, focused_linear_attention, threads)


@pytest.mark.parametrize("shared", [True, False])
def test_convolution(rng, shared):
    q, k, v = qkv(rng, batch=2, heads=2, rows=35, keys=35)
    channels = 16 if shared else 32
    weight, bias = normal(rng, (channels, 1, 5, 5)), normal(rng, (channels,))
    most = 4 * np.abs(v).max() * np.abs(weight).sum(axis=(1, 2, 3)).max() + np.abs(bias).max()
    options = {"dwc_weight": weight, "dwc_bias": bias, "size": (5, 7)}
    linear_checks.compare(focused_linear_attention, oracle, q, k, v, most=most, **options)


def test_bad_input(rng):
    linear_checks.refused(focused_linear_attention, *qkv(rng))
    q, k, v = qkv(rng, heads=2, rows=37)
    for options, match in (
        ({"power": 0.0}, "power: got 0"),
        ({"norm_scope": "some"}, "norm_scope: got 'some'"),
        ({"channel_scale": np.ones(31, np.float32)}, "channel_scale: got shape"),
        ({"pos": np.ones((36, 32), np.float32)}, "pos: got shape"),
        ({"dwc_bias": np.ones(16, np.float32)}, "dwc_bias: got a bias without"),
        ({"dwc_weight": np.ones((16, 1, 3, 3), np.float32)}, "size: got None"),
        ({"dwc_weight": np.ones((16, 1, 3, 3), np.float32), "size": (5, 7)}, "size: got 5 x 7"),
        ({"dwc_weight": np.ones((15, 1, 3, 3), np.float32), "size": (1, 37)}, "dwc_weight: got shape"),
    ):
        with pytest.raises(ValueError, match=match):
            focused_linear_attention(q, k, v, **options)


# Identities


@SCOPE
def test_the_map_keeps_lengths(rng, norm_scope):
    """Of the reference, and of the features that the kernel makes of one head."""
    x = normal(rng, (1, 3, 20, 16))
    axes = (1, 3) if norm_scope == "all" else (3,)
    start = (np.maximum(x.astype(np.float64), 0) + 1e-6) / np.log(2)
    mapped = focused(x, 3.0, None, norm_scope)
    np.testing.assert_allclose((mapped**2).sum(axis=axes), (start**2).sum(axis=axes), rtol=1e-12)
    channel = np.full((3, 16), 1 / np.log(2), np.float32)
    given = {"map": "relu", "offset": 1e-6, "channel_factors": channel, "power": (3.0, False)}
    for found, exponent in zip(_core.feature_norms(x, given), (2, 6), strict=True):
        expected = (start[0] ** exponent).sum(axis=-1)
        tolerances.check_linear(found.reshape(3, 20), expected, exponent * expected, 30)


def test_power_1_is_relu_attention(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    out = focused_linear_attention(q, k, v, power=1.0, eps=0.0, norm_scope="head")
    plain = simplified_linear_attention(q, k, v, eps=0.0)
    # The offset of 1e-6 shifts weights by that share of a feature.
    np.testing.assert_allclose(out, plain, rtol=1e-4, atol=1e-4)


def test_rows_sum_to_1(rng):
    q, k, _ = qkv(rng, rows=20, keys=30)
    ones = np.ones((1, 2, 30, 4), np.float32)
    tolerances.check_linear(focused_linear_attention(q, k, ones, eps=0.0), np.ones((1, 4, 20, 4)), 4, 60)


def test_the_magnitude_of_queries_is_lost(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    q = np.abs(q) + np.float32(0.1)
    out = focused_linear_attention(q, k, v, eps=0.0)
    np.testing.assert_allclose(focused_linear_attention(8 * q, k, v, eps=0.0), out, rtol=1e-4, atol=1e-4)
