"""Long convolutions against the direct sum."""

import numpy as np
import pytest

import tolerances
from longattn.linear import diagonal_scan, toeplitz, toeplitz2d
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, normal

ways = pytest.mark.parametrize(("method", "precision"), [("fft", "float64"), ("fft", "float32"), ("direct", "float64")])


def check(actual, expected, x, kernel, method, precision):
    """An output errs by the largest that any could be, at the precision of the products."""
    most = np.sqrt((np.asarray(kernel, np.float64) ** 2).sum(axis=-1).max() * (np.abs(x.astype(np.float64)) ** 2).sum())
    finer = tolerances.U_DOUBLE / tolerances.U if method == "fft" and precision == "float64" else 1.0
    tolerances.check_linear(actual, expected, np.abs(expected) + finer * most + 1e-30, 64)


@ways
@pytest.mark.parametrize(("length", "rows"), [(1, None), (2, None), (63, None), (200, None), (50, 90), (90, 50)])
def test_reference(rng, method, precision, length, rows):
    for span, zero in ((length, 0), (2 * length - 1, length - 1), (5, 2), (300, 120)):
        for shape, kernels in (((2, length, 11), 11), ((2, 3, length, 4), 3)):
            x, kernel = normal(rng, shape), normal(rng, (kernels, span))
            options = {"zero": zero, "rows": rows}
            y = toeplitz(x, kernel, **options, method=method, precision=precision)
            check(y, reference.toeplitz(x, kernel, **options), x, kernel, method, precision)


@ways
@pytest.mark.parametrize(("size", "span"), [((1, 1), (1, 1)), ((7, 9), (3, 3)), ((7, 9), (13, 20)), ((12, 5), (4, 30))])
def test_maps(rng, method, precision, size, span):
    x, kernel = normal(rng, (2, *size, 3)), normal(rng, (3, *span))
    for centre in (None, (0, 0), (span[0] - 1, span[1] // 3)):
        y = toeplitz2d(x, kernel, centre=centre, method=method, precision=precision)
        expected = reference.toeplitz2d(x, kernel, centre=centre)
        check(y, expected, x, kernel.reshape(3, -1), method, precision)


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, method, precision, dtype, layout):
    x, kernel = normal(rng, (2, 3, 40, 9), dtype, layout), normal(rng, (3, 79))
    y = toeplitz(x, kernel, zero=39, method=method, precision=precision)
    assert y.dtype == dtype
    check(y, reference.toeplitz(x, kernel, zero=39), x, kernel, method, precision)


def test_the_direct_product_on_every_instruction_set(rng, isa):
    x, kernel = normal(rng, (2, 90, 70)), normal(rng, (70, 179))
    y = toeplitz(x, kernel, zero=89, method="direct")
    check(y, reference.toeplitz(x, kernel, zero=89), x, kernel, "direct", "float64")


def test_threads_do_not_change_a_bit(rng, threads):
    x, kernel = normal(rng, (2, 100, 30)), normal(rng, (30, 100))
    whole = toeplitz(x, kernel, method="fft")
    for c in (0, 9, 29):
        np.testing.assert_array_equal(
            whole[..., c], toeplitz(x[..., c : c + 1], kernel[c : c + 1], method="fft")[..., 0]
        )


def test_it_is_the_scan_with_a_kernel_of_powers(rng, isa):
    decay, weights, x = rng.uniform(0.8, 1, (10, 3)), rng.standard_normal((10, 3)), normal(rng, (2, 300, 10))
    kernel = (weights[..., None] * decay[..., None] ** np.arange(300)).sum(axis=1)
    scanned, _ = diagonal_scan(x, decay, np.ones((10, 3)), weights)
    size = reference.diagonal_scan(np.abs(x), decay, np.ones((10, 3)), np.abs(weights))
    tolerances.check_linear(scanned, toeplitz(x, kernel).astype(np.float64), size, 300)


def test_nothing(rng):
    assert toeplitz(normal(rng, (2, 0, 3)), normal(rng, (3, 5)), method="fft").shape == (2, 0, 3)
    assert not toeplitz(normal(rng, (2, 0, 3)), normal(rng, (3, 5)), rows=4, method="fft").any()
    assert toeplitz2d(normal(rng, (0, 4, 4, 3)), normal(rng, (3, 5, 5)), method="fft").shape == (0, 4, 4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((4, 5), np.float32)}, ValueError, r"x: got shape \(4, 5\), expected \[B, L, C\] or"),
        ({"kernel": np.zeros((4, 5))}, ValueError, r"kernel: got shape \(4, 5\)"),
        ({"kernel": np.zeros((3, 0))}, ValueError, "expected at least one weight"),
        ({"zero": 6}, ValueError, "zero: got 6"),
        ({"rows": -1}, ValueError, "rows: got -1"),
        ({"method": "fast"}, ValueError, "method: got 'fast'"),
        ({"precision": "half"}, ValueError, "precision: got 'half'"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    with pytest.raises(error, match=message):
        toeplitz(**({"x": normal(rng, (2, 7, 3)), "kernel": normal(rng, (3, 6))} | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((4, 5, 3), np.float32)}, ValueError, r"x: got shape \(4, 5, 3\), expected \[B, H, W, C\]"),
        ({"kernel": np.zeros((4, 5, 5))}, ValueError, r"kernel: got shape \(4, 5, 5\)"),
        ({"kernel": np.zeros((3, 0, 5))}, ValueError, "expected at least one weight"),
        ({"centre": 2}, TypeError, "centre: got 2"),
        ({"centre": (1, 5)}, ValueError, "centre: got 5"),
    ],
)
def test_bad_maps(rng, change, error, message):
    with pytest.raises(error, match=message):
        toeplitz2d(**({"x": normal(rng, (2, 7, 4, 3)), "kernel": normal(rng, (3, 5, 5))} | change))
