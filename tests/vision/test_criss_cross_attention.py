"""`criss_cross_attention`: the lines through each place."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import criss_cross_attention
from longattn.vision.criss_cross_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 4, 5, 12), bias=True):
    c = shape[-1]
    return normal(rng, shape), weights(rng, c, 3, bias), weights(rng, c, 3, bias), weights(rng, c, c, bias)


@pytest.mark.parametrize("shape", [(2, 4, 5, 12), (1, 1, 7, 8), (1, 7, 1, 8), (1, 1, 1, 4), (2, 9, 6), (1, 3, 4, 2, 8)])
@pytest.mark.parametrize("rounds", [1, 2])
def test_reference(rng, isa, shape, rounds):
    check(METHOD, *arguments(rng, shape), gamma=0.7, scale=0.6, rounds=rounds)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng))


@pytest.mark.parametrize("shape", [(2, 6, 1, 8), (2, 1, 6, 8)])
def test_a_line_is_attention(rng, shape):
    x, wq, wk, wv = arguments(rng, shape, bias=False)
    rows = x.reshape(2, 1, 6, 8)
    expected = la.attention(rows @ wq, rows @ wk, rows @ wv, scale=1.0).reshape(shape) + x
    same(METHOD, criss_cross_attention(x, wq, wk, wv, rounds=1), expected, x, wq, wk, wv, rounds=1)


def test_gamma_zero(rng):
    x, *rest = arguments(rng)
    np.testing.assert_array_equal(criss_cross_attention(x, *rest, gamma=0.0), x)


def test_equal_values(rng):
    x, wq, wk, _ = arguments(rng)
    b = normal(rng, (12,))
    wv = np.zeros((12, 12), F32), b
    out = criss_cross_attention(x, wq, wk, wv, gamma=0.5, rounds=1)
    same(METHOD, out, x + 0.5 * b, x, wq, wk, wv, gamma=0.5, rounds=1)


def test_reach(rng):
    x, *rest = arguments(rng, (1, 4, 5, 12))
    other = x.copy()
    other[0, 1, 2] += 1
    one, two = (
        np.abs(criss_cross_attention(other, *rest, rounds=n) - criss_cross_attention(x, *rest, rounds=n)).max(axis=-1)[
            0
        ]
        for n in (1, 2)
    )
    cross = np.zeros((4, 5), bool)
    cross[1], cross[:, 2] = True, True
    assert (one[cross] > 0).all() and (one[~cross] == 0).all()
    assert (two > 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 3), F32)}, ValueError, r"x: got shape \(2, 3\)"),
        ({"x": np.zeros((1, 4, 5, 12))}, TypeError, r"x: got dtype float64"),
        ({"x": np.zeros((1, 0, 5, 12), F32)}, ValueError, r"x: got an empty axis"),
        ({"wq": np.zeros((11, 3), F32)}, ValueError, r"wq: got shape \(11, 3\), expected \[12, n\]"),
        ({"wk": np.zeros((12, 4), F32)}, ValueError, r"wk: got shape \(12, 4\), expected \[12, 3\]"),
        ({"wv": (np.zeros((12, 12), F32),)}, TypeError, r"wv: got 1 parts"),
        ({"rounds": 0}, ValueError, r"rounds: got 0"),
        ({"gamma": "1"}, TypeError, r"gamma: got '1'"),
        ({"scale": np.inf}, ValueError, r"scale: got inf"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, wq, wk, wv = arguments(rng)
    raises(METHOD, error, message, {"x": x, "wq": wq, "wk": wk, "wv": wv}, **change)
