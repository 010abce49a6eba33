"""`local_concentration`."""

import numpy as np
import pytest

import tolerances
from longattn.linear import local_concentration
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, LAYOUTS, normal

check = tolerances.check_layer


def inputs(rng, size=(5, 7), channels=6, taps=(7, 7), dtype=F32, layout="contiguous"):
    def conv():
        return normal(rng, (channels, *taps), spread=0.2), normal(rng, (channels,))

    norm = (normal(rng, (channels,)), np.abs(normal(rng, (channels,))), *(normal(rng, (channels,)) for _ in range(2)))
    return normal(rng, (2, *size, channels), dtype, layout), conv(), norm, conv()


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (12, 3)])
@pytest.mark.parametrize("taps", [(7, 7), (3, 1)])
def test_reference(rng, isa, size, taps):
    given = inputs(rng, size, taps=taps)
    check(local_concentration(*given), reference.local_concentration(*given), depth=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, dtype, layout):
    given = inputs(rng, dtype=dtype, layout=layout)
    y = local_concentration(*given, eps=1e-3)
    assert y.dtype == dtype
    check(y, reference.local_concentration(*given, eps=1e-3), depth=2)


def test_without_second_taps_nothing_is_added(rng):
    x, first, norm, (taps, _) = inputs(rng)
    np.testing.assert_array_equal(local_concentration(x, first, norm, (0 * taps, None)), x)


def test_a_constant_inside_reaches_the_borders_as_zeros_do(rng):
    """Places outside are zeros of the second convolution, not what the norm makes of zeros."""
    x, (taps, _), _, _ = inputs(rng, size=(3, 3))
    ones, zeros = np.ones(6, F32), np.zeros(6, F32)
    y = local_concentration(0 * x, (taps, None), (zeros, ones, ones, ones), (np.ones((6, 3, 3), F32), None))
    np.testing.assert_allclose(y[0, :, :, 0], [[4, 6, 4], [6, 9, 6], [4, 6, 4]], rtol=1e-6)


def test_wrong_arguments(rng):
    x, first, norm, second = inputs(rng)
    for arguments, error, message in (
        ((x[0], first, norm, second), ValueError, "x: got shape"),
        ((x.astype(int), first, norm, second), TypeError, "x: got dtype"),
        ((x, first[0], norm, second), TypeError, "first: got ndarray"),
        ((x, first, norm[:3], second), TypeError, "norm: got tuple"),
        ((x, first, [w[1:] for w in norm], second), ValueError, "norm: got 5 channels"),
        ((x, first, (norm[0], -norm[1], *norm[2:]), second), ValueError, "var: got"),
        ((x, (first[0][1:], None), norm, second), ValueError, "weight: got shape"),
        ((x, first, norm, (second[0], second[1][1:])), ValueError, "bias: got shape"),
    ):
        with pytest.raises(error, match=message):
            local_concentration(*arguments)
