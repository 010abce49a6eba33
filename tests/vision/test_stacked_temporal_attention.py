"""`stacked_temporal_attention`: over the frames of each place."""

import numpy as np
import pytest

from longattn.vision import attend_over, stacked_temporal_attention
from longattn.vision.stacked_temporal_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 5, 4, 12), bias=True):
    return normal(rng, shape), tuple(weights(rng, 12, 12, bias) for _ in range(4))


@pytest.mark.parametrize("shape", [(2, 5, 4, 12), (1, 1, 3, 12), (1, 6, 1, 12)])
@pytest.mark.parametrize("base", [None, 100.0])
@pytest.mark.parametrize("causal", [False, True])
def test_reference(rng, isa, shape, base, causal):
    norm = (normal(rng, (12,)), normal(rng, (12,)))
    check(METHOD, *arguments(rng, shape), heads=3, norm=norm, base=base, causal=causal)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), heads=3)


def test_without_positions_it_is_attention_over_frames(rng):
    x, w = arguments(rng, bias=False)
    expected = x + attend_over(x @ w[0], x @ w[1], x @ w[2], "bfn", "f", heads=3) @ w[3]
    same(METHOD, stacked_temporal_attention(x, w, heads=3, base=None), expected, x, w, heads=3, base=None)


def test_one_frame(rng):
    x, w = arguments(rng, (2, 1, 4, 12), bias=False)
    same(METHOD, stacked_temporal_attention(x, w, heads=3), x + x @ w[2] @ w[3], x, w, heads=3)


def test_an_output_of_zeros(rng):
    x, w = arguments(rng)
    np.testing.assert_array_equal(stacked_temporal_attention(x, (*w[:3], np.zeros((12, 12), F32)), heads=3), x)


def test_permuted_places(rng):
    x, w = arguments(rng)
    order = rng.permutation(4)
    moved, out = (stacked_temporal_attention(a, w, heads=3) for a in (x[:, :, order], x))
    same(METHOD, moved, out[:, :, order], x, w, heads=3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 5, 12), F32)}, ValueError, r"x: got shape \(2, 5, 12\)"),
        ({"base": 1.0}, ValueError, r"base: got 1.0"),
        ({"heads": 4}, ValueError, r"base: got 10000.0 for heads of 3"),
        ({"causal": None}, TypeError, r"causal: got None"),
        ({"weights": (None,) * 3}, TypeError, r"weights: got tuple"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, w = arguments(rng)
    raises(METHOD, error, message, {"x": x, "weights": w, "heads": 3}, **change)
