"""`forward_cross_attention`: own tokens and those of earlier blocks."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import depthwise_convolution, forward_cross_attention, merge_tokens
from longattn.vision.forward_cross_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, count=6, bias=True):
    return normal(rng, (2, 4, 5, 12)), normal(rng, (2, count, 12)), *(weights(rng, 12, 12, bias) for _ in range(3))


def dense(x, w):
    rows = [(x @ m).reshape(2, -1, 3, 4).swapaxes(1, 2) for m in w]
    return la.attention(*rows).swapaxes(1, 2).reshape(x.shape)


@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("after", [False, True])
def test_reference(rng, isa, count, after):
    options = {
        "offset_table": normal(rng, (3, 20)),
        "cross_bias": normal(rng, (3, count)),
        "wo": weights(rng, 12, 5, True),
    }
    options |= {"cross_scale": normal(rng, (count,)), "cross_norm": (normal(rng, (12,)), normal(rng, (12,)))}
    check(METHOD, *arguments(rng, count), heads=3, scale_after_norm=after, **options)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), heads=3)


def test_without_cross_tokens(rng):
    x, cross, *w = arguments(rng, bias=False)
    out = forward_cross_attention(x, cross[:, :0], *w, heads=3)
    same(METHOD, out, dense(x, w), x, cross, *w, heads=3)
    hidden = forward_cross_attention(x, cross, *w, heads=3, cross_bias=np.full((3, 6), -np.inf))
    same(METHOD, hidden, dense(x, w), x, cross, *w, heads=3)


def test_own_tokens_again(rng):
    x, _, *w = arguments(rng, bias=False)
    out = forward_cross_attention(x, x.reshape(2, 20, 12), *w, heads=3)
    same(METHOD, out, dense(x, w), x, x.reshape(2, 20, 12), *w, heads=3)


def test_merged_tokens(rng):
    x, kernel = normal(rng, (2, 8, 9, 12)), normal(rng, (7, 7, 12))
    tokens = merge_tokens(x, kernel)
    np.testing.assert_array_equal(tokens, depthwise_convolution(x, kernel, stride=4).reshape(2, -1, 12))
    assert tokens.shape == (2, 6, 12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cross": np.zeros((2, 6, 11), F32)}, ValueError, r"cross: got shape \(2, 6, 11\)"),
        ({"offset_table": np.zeros((3, 19))}, ValueError, r"offset_table: got shape \(3, 19\)"),
        ({"cross_bias": np.zeros((3, 5))}, ValueError, r"cross_bias: got shape \(3, 5\)"),
        ({"cross_scale": np.zeros(5)}, ValueError, r"cross_scale: got shape \(5,\)"),
        ({"cross_norm": 1}, TypeError, r"cross_norm: got int"),
        ({"scale_after_norm": 1}, TypeError, r"scale_after_norm: got 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    names = ("x", "cross", "wq", "wk", "wv")
    raises(METHOD, error, message, dict(zip(names, arguments(rng), strict=True)) | {"heads": 3}, **change)
