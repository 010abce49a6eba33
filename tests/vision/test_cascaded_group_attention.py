"""`cascaded_group_attention`: heads in a row."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import absolute_offset_bias, cascaded_group_attention, depthwise_convolution
from longattn.vision.cascaded_group_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 5, 6, 12), heads=3, dim=3, bias=True):
    width = shape[-1] // heads
    wqkv = [weights(rng, width, 2 * dim + width, bias) for _ in range(heads)]
    kernels = [
        (0.3 * normal(rng, (5, 5, dim)), normal(rng, (dim,))) if bias else normal(rng, (3, 3, dim))
        for _ in range(heads)
    ]
    return normal(rng, shape), wqkv, kernels, weights(rng, shape[-1], 7, bias)


@pytest.mark.parametrize("window", [None, 3, 6])
@pytest.mark.parametrize("cascade", [True, False])
def test_reference(rng, isa, window, cascade):
    entries = 9 if window == 3 else 30
    check(METHOD, *arguments(rng), key_dim=3, tables=normal(rng, (3, entries)), window=window, cascade=cascade)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), key_dim=3, window=4)


def heads_of(x, w, dim):
    qkv = x @ w
    return (
        a.reshape(len(x), 1, -1, a.shape[-1]) for a in (qkv[..., :dim], qkv[..., dim : 2 * dim], qkv[..., 2 * dim :])
    )


def test_one_plain_head(rng):
    x, (w,), _, wo = arguments(rng, heads=1, bias=False)
    delta = np.zeros((5, 5, 3), F32)
    delta[2, 2] = 1
    out = cascaded_group_attention(x, [w], [delta], wo, key_dim=3)
    expected = np.maximum(la.attention(*heads_of(x, w, 3)).reshape(x.shape), 0) @ wo
    same(METHOD, out, expected, x, [w], [delta], wo, key_dim=3)


def test_one_head(rng):
    x, (w,), (kernel,), wo = arguments(rng, heads=1, bias=False)
    table = normal(rng, (1, 30))
    out = cascaded_group_attention(x, [w], [kernel], wo, key_dim=3, tables=table)
    _, k, v = heads_of(x, w, 3)
    q = depthwise_convolution((x @ w)[..., :3], kernel).reshape(2, 1, 30, 3)
    expected = np.maximum(la.attention(q, k, v, bias=absolute_offset_bias(table, (5, 6))).reshape(x.shape), 0) @ wo
    same(METHOD, out, expected, x, [w], [kernel], wo, key_dim=3, tables=table)


def test_without_the_cascade(rng):
    x, wqkv, kernels, _ = arguments(rng, bias=False)
    wo = np.eye(12, dtype=F32)
    out = cascaded_group_attention(x, wqkv, kernels, wo, key_dim=3, cascade=False)
    for n in range(3):
        part = slice(4 * n, 4 * n + 4)
        alone = cascaded_group_attention(x[..., part], wqkv[n : n + 1], kernels[n : n + 1], np.eye(4), key_dim=3)
        same(METHOD, out[..., part], alone, x[..., part], wqkv[n : n + 1], kernels[n : n + 1], np.eye(4), key_dim=3)


def test_a_window_of_the_image(rng):
    args = arguments(rng)
    one, other = (cascaded_group_attention(*args, key_dim=3, window=n) for n in (None, 6))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernels": []}, ValueError, r"kernels: got 0, expected 3"),
        ({"kernels": [np.ones((3, 4, 3))] * 3}, ValueError, r"kernels\[0\]: got shape \(3, 4, 3\), expected odd sizes"),
        ({"wqkv": []}, ValueError, r"heads of wqkv: got 0"),
        ({"key_dim": 2}, ValueError, r"wqkv\[0\]: got shape \(4, 10\), expected \[4, 8\]"),
        ({"key_dim": 5, "cascade": False}, ValueError, r"wqkv\[0\]: got 10 outputs, expected more than 10"),
        ({"tables": np.zeros((3, 9))}, ValueError, r"tables: got shape \(3, 9\), expected \[3, 30\]"),
        ({"wo": np.zeros((11, 4))}, ValueError, r"wo: got shape \(11, 4\)"),
        ({"window": 0}, ValueError, r"window: got 0"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, wqkv, kernels, wo = arguments(rng)
    raises(METHOD, error, message, {"x": x, "wqkv": wqkv, "kernels": kernels, "wo": wo, "key_dim": 3}, **change)
