"""`deformable_token_merging`: four sampled features each."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import deformable_token_merging, relative_position_bias
from longattn.vision.convolution import convolution, gelu
from longattn.vision.deformable_token_merging import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 6, 8, 5)):
    return normal(rng, shape), weights(rng, 4 * shape[-1], 7, True)


@pytest.mark.parametrize("shape", [(2, 6, 8, 5), (1, 2, 2, 5)])
@pytest.mark.parametrize("activation", [True, False])
def test_reference(rng, isa, shape, activation):
    options = {
        "offset_kernel": 0.3 * normal(rng, (2, 2, 5, 8)),
        "offset_bias": normal(rng, (8,)),
        "activation": activation,
    }
    check(METHOD, *arguments(rng, shape), scale=normal(rng, (7,)), shift=normal(rng, (7,)), **options)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), offset_kernel=0.3 * normal(rng, (2, 2, 5, 8)))


def test_without_offsets(rng):
    x, (w, b) = arguments(rng)
    expected = gelu(convolution(x, w.reshape(2, 2, 5, 7), stride=2, padding=0, bias=b))
    same(METHOD, deformable_token_merging(x, (w, b)), expected, x, (w, b))


def test_whole_offsets_pick_places(rng):
    x, w = arguments(rng)
    moved = np.zeros_like(x)
    moved[:, :-1, 2:] = x[:, 1:, :-2]
    out = deformable_token_merging(x, w, offset_bias=np.tile(np.array([1, -2], F32), 4))
    same(METHOD, out, deformable_token_merging(moved, w), moved, w)


def test_a_table_of_zeros(rng):
    q = normal(rng, (1, 2, 12, 8))
    bias = relative_position_bias(np.zeros((35, 2), F32), (3, 4))
    np.testing.assert_array_equal(la.attention(q, q, q, bias=bias), la.attention(q, q, q))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((1, 5, 4, 5), F32)}, ValueError, r"x: got 5 x 4 places, expected even"),
        ({"w": np.zeros((19, 7))}, ValueError, r"w: got shape \(19, 7\)"),
        ({"offset_kernel": np.zeros((2, 2, 5, 4))}, ValueError, r"offset_kernel: got shape"),
        ({"scale": np.zeros(5)}, ValueError, r"scale: got shape \(5,\)"),
        ({"activation": 0}, TypeError, r"activation: got 0"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, w = arguments(rng)
    raises(METHOD, error, message, {"x": x, "w": w}, **change)
