"""`adaptive_cross_layer_attention`: sampled features of earlier layers."""

import numpy as np
import pytest

from longattn.vision import adaptive_cross_layer_attention, depthwise_convolution
from longattn.vision.adaptive_cross_layer_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, count=2, points=3, bias=True):
    x, layers = normal(rng, (2, 4, 5, 8)), [normal(rng, (2, 4, 5, 8)) for _ in range(count)]
    n = count * points
    return (
        x, layers, weights(rng, 8, 8, bias), weights(rng, 8, 2 * n, bias), weights(rng, 8, n, bias),
        normal(rng, (3, 3, 8)) / 3,
    )  # fmt: skip


@pytest.mark.parametrize(("count", "points"), [(2, 3), (1, 1), (3, 2)])
@pytest.mark.parametrize("selected", [False, True])
def test_reference(rng, isa, count, points, selected):
    kept = rng.random((2, 4, 5, count * points)) < 0.7 if selected else None
    check(METHOD, *arguments(rng, count, points), shift=normal(rng, (8,)), kept=kept)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng))


def test_one_point_without_offset(rng):
    x, layers, ref, _, to, kernel = arguments(rng, 1, 1, bias=False)
    still = np.zeros((8, 2), F32)
    out = adaptive_cross_layer_attention(x, layers, ref, still, to, kernel)
    expected = x + depthwise_convolution(layers[0] @ ref, kernel)
    same(METHOD, out, expected, x, layers, ref, still, to, kernel)


def test_equal_offsets(rng):
    x, layers, ref, _, to, kernel = arguments(rng, 1, 3)
    still = (np.zeros((8, 6), F32), np.tile(np.array([0.3, -0.4], F32), 3))
    one, two = (adaptive_cross_layer_attention(x, layers, ref, still, w, kernel) for w in (to, (0 * to[0], to[1])))
    same(METHOD, one, two, x, layers, ref, still, to, kernel)


def test_all_points_kept(rng):
    args = arguments(rng)
    one, two = (adaptive_cross_layer_attention(*args, kept=m) for m in (None, np.ones((2, 4, 5, 6), bool)))
    np.testing.assert_array_equal(one, two)
    none = adaptive_cross_layer_attention(*args, kept=np.zeros((2, 4, 5, 6), bool))
    np.testing.assert_array_equal(none, args[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": []}, ValueError, r"layers: got list, expected at least one"),
        ({"layers": [np.zeros((2, 4, 4, 8), F32)]}, ValueError, r"layers\[0\]: got shape \(2, 4, 4, 8\)"),
        ({"weights": np.zeros((8, 5))}, ValueError, r"weights: got 5 outputs, expected a multiple of 2"),
        ({"offsets": np.zeros((8, 11))}, ValueError, r"offsets: got shape \(8, 11\)"),
        ({"kept": np.ones((2, 4, 5, 6))}, TypeError, r"kept: got dtype float64"),
        ({"kept": np.ones((2, 4, 5, 5), bool)}, ValueError, r"kept: got shape \(2, 4, 5, 5\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    names = ("x", "layers", "w_ref", "offsets", "weights", "kernel")
    raises(METHOD, error, message, dict(zip(names, arguments(rng), strict=True)), **change)
