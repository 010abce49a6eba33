"""`deformable_kv_attention_2d`: keys and values from sampled places."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import deformable_kv_attention_2d
from longattn.vision.deformable_kv_attention_2d import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 6, 7, 12), bias=True):
    return normal(rng, shape), *(weights(rng, 12, 12, bias) for _ in range(3))


def network(rng, groups, k=3, norm=True, spread=1.0):
    width = 12 // groups
    given = {
        "groups": groups,
        "offset_kernel": normal(rng, (k, k, width)) / k,
        "offset_weights": spread * normal(rng, (width, 2)),
    }
    if norm:
        given["offset_norm"] = (normal(rng, (width,)), normal(rng, (width,)))
    return given


def dense(x, q_rows, w, heads=4):
    rows = [(a @ m).reshape(len(x), -1, heads, 3).swapaxes(1, 2) for a, m in zip((q_rows, x, x), w, strict=True)]
    return la.attention(*rows).swapaxes(1, 2).reshape(len(x), -1, 12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("k", "stride", "factor", "reference"),
    [(3, 2, 2.0, "code"), (2, 2, -1.0, "symmetric"), (5, 1, 1.0, "corners"), (5, 4, 2.0, "code")],
)
def test_reference(rng, isa, groups, k, stride, factor, reference):
    options = network(rng, groups, k, norm=stride > 1, spread=0.3)
    options |= {"stride": stride, "range_factor": factor, "reference": reference}
    options |= {"bias_table": normal(rng, (4, 11, 13)), "wo": weights(rng, 12, 5, True)}
    check(METHOD, *arguments(rng), heads=4, **options)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_biases_that_layers_make(rng, isa, groups, factor):
    layers = weights(rng, 2, 32, True), weights(rng, 32, 4 // groups, groups == 1)
    options = network(rng, groups, spread=0.3) | {"stride": 2, "range_factor": factor, "bias_layers": layers}
    check(METHOD, *arguments(rng), heads=4, **options)


def test_layers_of_zeros_make_no_bias(rng):
    given, options = arguments(rng), network(rng, 2, spread=0.3)
    options |= {"bias_layers": (weights(rng, 2, 8), np.zeros((8, 2), F32))}
    out = deformable_kv_attention_2d(*given, heads=4, **options)
    without = deformable_kv_attention_2d(*given, heads=4, **options | {"bias_layers": None})
    same(METHOD, out, without, *given, heads=4, **options)


@pytest.mark.parametrize("shape", [(1, 1, 5, 12), (1, 1, 1, 12)])
def test_thin_images(rng, shape):
    check(METHOD, *arguments(rng, shape), heads=4, **network(rng, 2, 1, norm=False))


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), heads=4, stride=2, **network(rng, 2, spread=0.3))


def test_zero_offsets_give_attention(rng):
    x, *w = arguments(rng, bias=False)
    options = network(rng, 2, norm=False) | {"offset_weights": np.zeros((6, 2), F32), "reference": "corners"}
    expected = dense(x.reshape(2, 42, 12), x.reshape(2, 42, 12), w).reshape(x.shape)
    out = deformable_kv_attention_2d(x, *w, heads=4, **options)
    same(METHOD, out, expected, x, *w, heads=4, **options)


def test_whole_offsets_pick_places(rng):
    """A constant offset of one place, limited by the range to one point of the coarse grid."""
    x, *w = arguments(rng, (1, 6, 6, 12), bias=False)
    zero = np.zeros((3, 3, 12), F32)
    norm = (np.zeros(12, F32), np.full(12, 30, F32))
    to = np.concatenate([np.full((12, 1), 1, F32), np.full((12, 1), -1, F32)], axis=1)
    # The tanh is 1: offsets of 2 / (n - 1) are one place down and one to the left.
    options = {
        "offset_kernel": zero,
        "offset_norm": norm,
        "offset_weights": to,
        "reference": "corners",
        "range_factor": 2.0,
    }
    moved = np.zeros_like(x)
    moved[:, :-1, 1:] = x[:, 1:, :-1]
    expected = dense(moved.reshape(1, 36, 12), x.reshape(1, 36, 12), w).reshape(x.shape)
    out = deformable_kv_attention_2d(x, *w, heads=4, **options)
    same(METHOD, out, expected, x, *w, heads=4, **options)


def test_without_offsets_keys_are_pooled(rng):
    x, *w = arguments(rng, (2, 6, 6, 12), bias=False)
    pooled = x.reshape(2, 3, 2, 3, 2, 12).mean(axis=(2, 4)).reshape(2, 9, 12)
    expected = dense(pooled, x.reshape(2, 36, 12), w).reshape(x.shape)
    out = deformable_kv_attention_2d(x, *w, heads=4, stride=2, no_offset=True)
    same(METHOD, out, expected, x, *w, heads=4, stride=2, no_offset=True)
    check(METHOD, *arguments(rng), heads=4, stride=3, no_offset=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offset_kernel": None}, ValueError, r"no_offset: got False, expected offset_kernel and offset_weights"),
        ({"no_offset": True}, ValueError, r"no_offset: got True, expected no offset_kernel"),
        ({"groups": 3}, ValueError, r"groups: got 3"),
        ({"offset_weights": np.zeros((6, 3))}, ValueError, r"offset_weights: got shape \(6, 3\)"),
        ({"offset_norm": 3}, TypeError, r"offset_norm: got int"),
        ({"reference": "other"}, ValueError, r"reference: got 'other'"),
        ({"bias_table": np.zeros((4, 11, 12))}, ValueError, r"bias_table: got shape \(4, 11, 12\)"),
        ({"bias_layers": 3}, TypeError, r"bias_layers: got int, expected two layers"),
        ({"bias_layers": (np.zeros((3, 8)),) * 2}, ValueError, r"bias_layers\[0\]: got shape \(3, 8\)"),
        (
            {"bias_layers": (np.zeros((2, 8)),) * 2},
            ValueError,
            r"bias_layers\[1\]: got shape \(2, 8\), expected \[8, 2\]",
        ),
        (
            {"bias_layers": (np.zeros((2, 8)), np.zeros((8, 2))), "bias_table": np.zeros((4, 11, 13))},
            ValueError,
            r"bias_layers: got some with a bias_table",
        ),
        ({"stride": 7}, ValueError, r"stride: got 7, expected 1 to 6"),
        ({"offset_weights": np.full((6, 2), np.nan)}, ValueError, r"coords: got NaN"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, wq, wk, wv = arguments(rng)
    raises(METHOD, error, message, {"x": x, "wq": wq, "wk": wk, "wv": wv, "heads": 4, **network(rng, 2)}, **change)
