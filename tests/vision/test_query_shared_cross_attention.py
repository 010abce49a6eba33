"""`query_shared_cross_attention`: the same queries to two streams."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import query_shared_cross_attention
from longattn.vision.query_shared_cross_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, bias=True):
    pair = [(weights(rng, c, 12, bias), weights(rng, c, 6, bias)) for c in (8, 10)]
    x, first, second = normal(rng, (2, 7, 12)), normal(rng, (2, 5, 8)), normal(rng, (2, 9, 10))
    return x, first, second, weights(rng, 12, 12, bias), *pair


def heads_of(x):
    return x.reshape(*x.shape[:2], 3, -1).swapaxes(1, 2)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_reference(rng, isa, joint, masked):
    masks = {"first_mask": rng.random((7, 5)) < 0.5, "second_mask": rng.random((2, 1, 7, 9)) < 0.5} if masked else {}
    check(METHOD, *arguments(rng), heads=3, joint=joint, wo=weights(rng, 6, 5, True), scale=0.6, **masks)


@pytest.mark.parametrize("joint", [False, True])
def test_kinds(rng, joint):
    check_kinds(METHOD, *arguments(rng), heads=3, joint=joint)


@pytest.mark.parametrize("joint", [False, True])
def test_one_stream_masked(rng, joint):
    x, first, second, wq, one, two = arguments(rng, bias=False)
    options = {"heads": 3, "joint": joint, "second_mask": np.zeros((7, 9), bool)}
    out = query_shared_cross_attention(x, first, second, wq, one, two, **options)
    expected = la.attention(heads_of(x @ wq), heads_of(first @ one[0]), heads_of(first @ one[1]))
    same(METHOD, out, expected.swapaxes(1, 2).reshape(2, 7, 6), x, first, second, wq, one, two, **options)


def test_joint_is_attention_to_both(rng):
    x, first, second, wq, one, two = arguments(rng, bias=False)
    out = query_shared_cross_attention(x, first, second, wq, one, two, heads=3, joint=True)
    k, v = (heads_of(np.concatenate([first @ a, second @ b], axis=1)) for a, b in zip(one, two, strict=True))
    expected = la.attention(heads_of(x @ wq), k, v).swapaxes(1, 2).reshape(2, 7, 6)
    same(METHOD, out, expected, x, first, second, wq, one, two, heads=3, joint=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"first": np.zeros((1, 5, 8), F32)}, ValueError, r"first: got shape \(1, 5, 8\)"),
        ({"first_weights": np.zeros((8, 12), F32)}, TypeError, r"first_weights: got ndarray"),
        ({"second_weights": (np.zeros((10, 12)), np.zeros((10, 9)))}, ValueError, r"second_weights wv: got shape"),
        ({"heads": 4}, ValueError, r"heads: got 4, expected a divisor of the 6 channels of wv"),
        ({"second_mask": np.zeros((7, 5), bool)}, ValueError, r"mask: got shape \(7, 5\)"),
        ({"joint": 1}, TypeError, r"joint: got 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    names = ("x", "first", "second", "wq", "first_weights", "second_weights")
    raises(METHOD, error, message, dict(zip(names, arguments(rng), strict=True)) | {"heads": 3}, **change)
