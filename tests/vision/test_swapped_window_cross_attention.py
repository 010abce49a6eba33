"""`swapped_window_cross_attention`: spatial and temporal features ask each other."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import grouped_attention, swapped_window_cross_attention
from longattn.vision.swapped_window_cross_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 3, 4, 5, 12), bias=True):
    return normal(rng, shape), normal(rng, shape), tuple(weights(rng, 12, 12, bias) for _ in range(4))


@pytest.mark.parametrize("windows", [2, (3, 2, 5), (1, 3, 2)])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_reference(rng, isa, windows, step):
    check(METHOD, *arguments(rng), heads=3, windows=windows, step=step)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), heads=3, windows=2)


def test_equal_features(rng):
    s, _, w = arguments(rng, bias=False)
    expected = s + grouped_attention(s @ w[0], s @ w[1], s @ w[2], 2, heads=3) @ w[3]
    out = swapped_window_cross_attention(s, s, w, heads=3, windows=2)
    same(METHOD, out, expected, s, s, w, heads=3, windows=2)


def test_a_window_of_everything(rng):
    s, t, w = arguments(rng, bias=False)
    rows = [(x @ m).reshape(2, 60, 3, 4).swapaxes(1, 2) for x, m in zip((s, t, t), w, strict=False)]
    expected = s + la.attention(*rows).swapaxes(1, 2).reshape(s.shape) @ w[3]
    out = swapped_window_cross_attention(s, t, w, heads=3, windows=(3, 4, 5))
    same(METHOD, out, expected, s, t, w, heads=3, windows=(3, 4, 5))


def test_steps_change_the_roles(rng):
    s, t, w = arguments(rng)
    one, two, three = (
        swapped_window_cross_attention(a, b, w, heads=3, windows=2, step=n)
        for a, b, n in ((s, t, 1), (t, s, 0), (s, t, 3))
    )
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temporal": np.zeros((2, 3, 4, 4, 12), F32)}, ValueError, r"temporal: got shape \(2, 3, 4, 4, 12\)"),
        ({"windows": (2, 2)}, ValueError, r"windows: got 2 numbers, expected 3"),
        ({"step": -1}, ValueError, r"step: got -1"),
        ({"weights": 1}, TypeError, r"weights: got int"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    s, t, w = arguments(rng)
    raises(METHOD, error, message, {"spatial": s, "temporal": t, "weights": w, "heads": 3, "windows": 2}, **change)
