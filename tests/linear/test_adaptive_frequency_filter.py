"""`adaptive_frequency_filter`."""

import numpy as np
import pytest

import tolerances
from longattn.linear import adaptive_frequency_filter
from longattn.reference import linear as reference
from longattn.reference.linear.adaptive_frequency_filter import frequency_mask
from random_arrays import DTYPES, F32, normal

check = tolerances.check_layer


def inputs(rng, size=(6, 8), blocks=2, channels=6, hidden=5, dtype=F32):
    inside = channels // blocks
    return {
        "x": normal(rng, (2, channels, *size), dtype),
        "w1": normal(rng, (2, blocks, inside, hidden), spread=0.4),
        "w2": normal(rng, (2, blocks, hidden, inside), spread=0.4),
        "b1": normal(rng, (2, blocks, hidden), spread=0.2),
        "b2": normal(rng, (2, blocks, inside), spread=0.2),
    }


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (6, 8), (4, 1), (1, 6)])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("biases", [False, True])
def test_reference(rng, size, blocks, biases):
    given = inputs(rng, size, blocks)
    if not biases:
        given |= {"b1": None, "b2": None}
    check(adaptive_frequency_filter(**given), reference.adaptive_frequency_filter(**given), depth=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    given = inputs(rng, dtype=dtype)
    y = adaptive_frequency_filter(**given)
    assert y.dtype == dtype
    check(y, reference.adaptive_frequency_filter(**given), depth=2)
    assert adaptive_frequency_filter(**(given | {"x": given["x"][..., :0]})).shape == (2, 6, 6, 0)


def constant(given, value, threshold=0.01):
    """A network that gives a real number whatever comes, `value` after it has shrunk."""
    after = np.zeros_like(given["b2"])
    after[0] = value + threshold
    return given | {"w2": np.zeros_like(given["w2"]), "b2": after}


def test_a_mask_of_1_gives_twice_the_map(rng):
    given = inputs(rng)
    check(adaptive_frequency_filter(**constant(given, 1.0)), 2 * given["x"].astype(np.float64))


def test_a_mask_within_the_threshold_returns_the_map(rng):
    given = constant(inputs(rng), -0.005)
    np.testing.assert_array_equal(adaptive_frequency_filter(**given), given["x"])


def test_a_constant_mask_commutes_with_shifts(rng):
    given = constant(inputs(rng), 0.7)
    y = adaptive_frequency_filter(**given)
    moved = adaptive_frequency_filter(**(given | {"x": np.roll(given["x"], (2, 3), axis=(2, 3))}))
    check(moved, np.roll(y, (2, 3), axis=(2, 3)).astype(np.float64))


def test_it_is_the_circular_convolution_with_the_masks_kernel(rng):
    given = inputs(rng, size=(5, 6))
    x = given["x"].astype(np.float64)
    spectrum = np.fft.rfft2(x, norm="ortho")
    mask = frequency_mask(spectrum, given["w1"], given["w2"], given["b1"], given["b2"], 0.01)
    # Only the part of the mask that a real kernel has: the edges of the half spectrum are their own mirror images.
    kernel = np.fft.irfft2(mask, s=(5, 6))
    edges = np.fft.rfft2(kernel)
    expected = np.zeros_like(x)
    for i in range(5):
        for j in range(6):
            expected += kernel[:, :, i, j, None, None] * np.roll(x, (i, j), axis=(2, 3))
    inside = adaptive_frequency_filter(**given) - x
    difference = np.fft.irfft2((mask - edges) * np.fft.rfft2(x), s=(5, 6))
    check(inside.astype(F32), expected + difference, depth=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((6, 6, 8), F32)}, ValueError, r"x: got shape \(6, 6, 8\)"),
        ({"w1": np.zeros((2, 2, 4, 5), F32)}, ValueError, "w1: got 2 blocks of 4 channels"),
        ({"w2": np.zeros((2, 2, 4, 3), F32)}, ValueError, r"w2: got shape \(2, 2, 4, 3\)"),
        ({"b1": np.zeros((2, 2, 4), F32)}, ValueError, r"b1: got shape \(2, 2, 4\)"),
        ({"threshold": -1}, ValueError, "threshold: got -1"),
        ({"threshold": "0"}, TypeError, "threshold: got '0'"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    with pytest.raises(error, match=message):
        adaptive_frequency_filter(**(inputs(rng) | change))
