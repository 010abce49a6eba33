"""`layer_and_channel_spatial_attention` and `channel_spatial_gate`."""

import numpy as np
import pytest

import tolerances
from longattn.reference import vision as reference
from longattn.vision import channel_spatial_gate, layer_and_channel_spatial_attention
from longattn.vision.layer_and_channel_spatial_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, close, raises, same


def layers(rng, shape=(2, 4, 3, 5, 6)):
    return 0.15 * normal(rng, shape)


@pytest.mark.parametrize("shape", [(2, 4, 3, 5, 6), (1, 1, 2, 2, 3), (3, 5, 40)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_reference(rng, isa, threads, shape, sign):
    check(METHOD, layers(rng, shape), gamma=0.7, sign=sign)


def test_kinds(rng):
    check_kinds(METHOD, layers(rng))


def test_gamma_of_zero(rng):
    x = layers(rng)
    np.testing.assert_array_equal(layer_and_channel_spatial_attention(x, gamma=0.0), x)
    np.testing.assert_array_equal(channel_spatial_gate(x[:, 0], normal(rng, (3, 3, 3)), gamma=0.0), x[:, 0])


def test_one_layer(rng):
    x = layers(rng, (2, 1, 3, 4))
    same(METHOD, layer_and_channel_spatial_attention(x, gamma=0.5), 1.5 * x, x, gamma=0.5)


def test_equal_layers(rng):
    x = np.repeat(layers(rng, (2, 1, 3, 4)), 3, axis=1)
    same(METHOD, layer_and_channel_spatial_attention(x), 2 * x, x)


def test_gate(rng, isa):
    given, options = (normal(rng, (2, 4, 5, 6)), normal(rng, (3, 3, 3))), {"bias": 0.2, "gamma": 0.6}
    out = channel_spatial_gate(*given, **options)
    close(out, *tolerances.perturbed(reference.channel_spatial_gate, given, options, F32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 3), F32)}, ValueError, r"x: got shape \(2, 3\)"),
        ({"sign": 0}, ValueError, r"sign: got 0"),
        ({"sign": 2}, ValueError, r"sign: got 2"),
        ({"gamma": None}, TypeError, r"gamma: got None"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    raises(METHOD, error, message, {"x": layers(rng)}, **change)


def test_bad_gates(rng):
    with pytest.raises(ValueError, match=r"kernel: got shape \(2, 3, 3\)"):
        channel_spatial_gate(normal(rng, (2, 4, 5, 6)), np.zeros((2, 3, 3)))
