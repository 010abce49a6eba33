"""`partial_visual_attention`: a convolution of some channels, gates or attention of the others."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import partial_visual_attention, relative_position_bias
from longattn.vision.convolution import convolution
from longattn.vision.partial_visual_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def of_mode(rng, mode, channels=8):
    return {
        "channel": weights(rng, 2 * channels, channels, True),
        "gaussian": 1.5,
        "spatial": weights(rng, channels, 1, True),
        "attention": tuple(weights(rng, channels, n, True) for n in (6, 6, channels)),
    }[mode]


def arguments(rng, mode, split=4):
    return normal(rng, (2, 5, 6, 12)), split, mode, of_mode(rng, mode, 12 - split)


def kernel(rng, split=4):
    return normal(rng, (3, 3, split, split), spread=0.2)


@pytest.mark.parametrize("mode", ["channel", "gaussian", "spatial", "attention"])
@pytest.mark.parametrize("split", [0, 4, 10])
def test_reference(rng, isa, mode, split):
    given = arguments(rng, mode, split)
    check(METHOD, *given, kernel=kernel(rng, split), heads=2, wo=weights(rng, 12, 7, True))
    check(METHOD, *given, heads=2)


def test_bias(rng):
    bias = relative_position_bias(normal(rng, (9 * 11, 2)), (5, 6))
    check(METHOD, *arguments(rng, "attention"), kernel=kernel(rng), heads=2, bias=bias)


@pytest.mark.parametrize("mode", ["channel", "gaussian", "spatial", "attention"])
def test_kinds(rng, mode):
    check_kinds(METHOD, *arguments(rng, mode), kernel=kernel(rng), heads=2)


@pytest.mark.parametrize(
    ("mode", "given"),
    [
        ("channel", (np.zeros((16, 8), F32), np.full(8, 100, F32))),
        ("spatial", (np.zeros((8, 1), F32), np.full(1, 100, F32))),
        ("gaussian", 1e9),
    ],
)
def test_a_gate_of_one_is_a_partial_convolution(rng, mode, given):
    x, taps = normal(rng, (2, 5, 6, 12)), kernel(rng)
    out = partial_visual_attention(x, 4, mode, given, kernel=taps)
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    np.testing.assert_allclose(out[..., :4], convolution(x[..., :4], taps), rtol=1e-6, atol=1e-6)


def test_a_split_of_all_is_a_convolution(rng):
    x, taps = normal(rng, (2, 5, 6, 12)), kernel(rng, 12)
    out = partial_visual_attention(x, 12, "attention", None, kernel=taps)
    np.testing.assert_array_equal(out, convolution(x, taps))


def test_a_split_of_none_is_attention(rng):
    given = arguments(rng, "attention", 0)
    rows = given[0].reshape(2, 30, 12)
    q, k, v = ((rows @ w + b).reshape(2, 30, 2, -1).swapaxes(1, 2) for w, b in given[3])
    expected = la.attention(q, k, v).swapaxes(1, 2).reshape(2, 5, 6, 12)
    same(METHOD, partial_visual_attention(*given, heads=2), expected, *given, heads=2)


@pytest.mark.parametrize(
    ("mode", "change", "error", "message"),
    [
        ("channel", {"split": 13}, ValueError, r"split: got 13, expected 0 to 12"),
        ("channel", {"mode": "mean"}, ValueError, r"mode: got 'mean'"),
        ("channel", {"weights": np.zeros((8, 8))}, ValueError, r"weights: got shape \(8, 8\)"),
        ("channel", {"kernel": np.zeros((2, 3, 4, 4))}, ValueError, r"kernel: got shape \(2, 3, 4, 4\)"),
        ("gaussian", {"weights": 0.0}, ValueError, r"weights: got 0.0"),
        ("attention", {"weights": None}, TypeError, r"weights: got NoneType"),
        ("attention", {"weights": (np.zeros((8, 6)), np.zeros((8, 6)), np.zeros((8, 6)))}, ValueError, r"6 channels"),
    ],
)
def test_bad_arguments(rng, mode, change, error, message):
    names = ("x", "split", "mode", "weights")
    raises(METHOD, error, message, dict(zip(names, arguments(rng, mode), strict=True)), **change)
