"""`scale_patch_attention`: over the scales of a patch, then over patches."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import scale_patch_attention
from longattn.vision.scale_patch_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 5, 4, 12), bias=True):
    return normal(rng, shape), *(tuple(weights(rng, 12, 12, bias) for _ in range(4)) for _ in range(2))


def attended(x, w):
    rows = [(x @ m).reshape(*x.shape[:-1], 3, 4).swapaxes(-2, -3) for m in w[:3]]
    return x + la.attention(*rows).swapaxes(-2, -3).reshape(x.shape) @ w[3]


@pytest.mark.parametrize("shape", [(2, 5, 4, 12), (1, 1, 3, 12), (1, 6, 1, 12)])
@pytest.mark.parametrize("class_tokens", [0, 1])
def test_reference(rng, isa, shape, class_tokens):
    norms = {name: (normal(rng, (12,)), normal(rng, (12,))) for name in ("scale_norm", "patch_norm")}
    check(METHOD, *arguments(rng, shape), heads=3, class_tokens=class_tokens, **norms)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), heads=3)


def test_scale_tokens_only(rng):
    x, first, second = arguments(rng, (2, 6, 1, 12), bias=False)
    zero = (*first[:3], np.zeros((12, 12), F32))
    out = scale_patch_attention(x, zero, second, heads=3)
    same(METHOD, out, attended(x[:, :, 0], second)[:, :, None], x, zero, second, heads=3)


def test_one_patch(rng):
    x, first, second = arguments(rng, (2, 1, 5, 12), bias=False)
    zero = (*second[:3], np.zeros((12, 12), F32))
    out = scale_patch_attention(x, first, zero, heads=3)
    same(METHOD, out, attended(x[:, 0], first)[:, None], x, first, zero, heads=3)


def test_patches_do_not_see_each_other(rng):
    x, first, second = arguments(rng)
    other = x.copy()
    other[:, 2, 1:] += 1
    zero = (*second[:3], np.zeros((12, 12), F32))
    one, two = (scale_patch_attention(a, first, zero, heads=3) for a in (x, other))
    changed = (np.abs(one - two) > 0).any(axis=(0, 2, 3))
    assert changed.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 5, 12), F32)}, ValueError, r"x: got shape \(2, 5, 12\)"),
        ({"x": np.zeros((2, 5, 0, 12), F32)}, ValueError, r"x: got shape \(2, 5, 0, 12\)"),
        ({"scale_weights": 3}, TypeError, r"scale_weights: got int"),
        ({"class_tokens": 6}, ValueError, r"class_tokens: got 6"),
        ({"scale_norm": 3}, TypeError, r"scale_norm: got int"),
        ({"heads": 7}, ValueError, r"heads: got 7"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, first, second = arguments(rng)
    raises(METHOD, error, message, {"x": x, "scale_weights": first, "patch_weights": second, "heads": 3}, **change)
