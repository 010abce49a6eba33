"""`hyena_pixel_conv` and the kernels it takes."""

import numpy as np
import pytest

import tolerances
from longattn.linear import hyena_pixel_conv, hyena_pixel_kernel, toeplitz2d
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, normal

check = tolerances.check_layer


def inputs(rng, size=(7, 9), kernel=(13, 17), short=3, channels=5, dtype=F32):
    taps = (short,) * len(size)
    return {
        "x": normal(rng, (2, *size, channels), dtype),
        "w_in": normal(rng, (channels, 3 * channels), spread=0.4),
        "short": normal(rng, (3 * channels, *taps), spread=0.4),
        "kernel": normal(rng, (channels, *kernel), spread=0.2),
    }


def whole(rng, **shape):
    norm = (normal(rng, (5,)), normal(rng, (5,)))
    return inputs(rng, **shape) | {"bias": normal(rng, (5,)), "w_out": normal(rng, (5, 4), spread=0.4), "norm": norm}


@pytest.mark.parametrize("make", [inputs, whole])
@pytest.mark.parametrize("kernel", [(1, 1), (5, 3), (13, 17), (30, 31)])
@pytest.mark.parametrize("size", [(7, 9), (1, 1)])
def test_maps(rng, make, kernel, size):
    given = make(rng, kernel=kernel, size=size)
    check(hyena_pixel_conv(**given), reference.hyena_pixel_conv(**given), depth=2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("make", [inputs, whole])
@pytest.mark.parametrize(("length", "span"), [(1, 1), (20, 20), (100, 199), (100, 7)])
def test_sequences(rng, isa, causal, make, length, span):
    given = make(rng, kernel=(span,), size=(length,))
    check(hyena_pixel_conv(**given, causal=causal), reference.hyena_pixel_conv(**given, causal=causal), depth=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    given = inputs(rng, dtype=dtype)
    y = hyena_pixel_conv(**given)
    assert y.dtype == dtype
    check(y, reference.hyena_pixel_conv(**given), depth=2)


def test_the_direct_convolution_gives_the_same(rng, isa):
    x, kernel = normal(rng, (2, 20, 17, 5)), normal(rng, (5, 23, 9))
    check(toeplitz2d(x, kernel, method="direct"), toeplitz2d(x, kernel, method="fft").astype(np.float64))


def test_a_kernel_of_1_in_the_middle_gives_the_product(rng, isa):
    given = inputs(rng)
    given["kernel"] = np.zeros((5, 13, 17), F32)
    given["kernel"][:, 6, 8] = 1
    h = reference.depthwise(given["x"].astype(np.float64) @ given["w_in"], given["short"], (1, 1))
    check(hyena_pixel_conv(**given), np.prod(np.split(h, 3, axis=-1), axis=0), depth=2)


def test_a_causal_kernel_is_hyena_of_order_2(rng, isa):
    given = inputs(rng, kernel=(100,), size=(100,))
    h = reference.depthwise(given["x"].astype(np.float64) @ given["w_in"], given["short"], (2,))
    q, k, v = np.split(h, 3, axis=-1)
    expected = np.zeros_like(v)
    for t in range(100):
        for j in range(t + 1):
            expected[:, t] += given["kernel"][:, t - j] * (q * k)[:, j]
    check(hyena_pixel_conv(**given, causal=True), v * expected, depth=2)


def test_kernels_from_a_network(rng):
    encoding = normal(rng, (3, 5, 7))
    layers = [(normal(rng, (3, 8)), normal(rng, (8,))), (normal(rng, (8, 4)), normal(rng, (4,)))]
    delta, shift = normal(rng, (4,)), normal(rng, (4,))
    kernel = hyena_pixel_kernel(encoding, layers, 2.5, delta, shift)
    assert kernel.shape == (4, 5, 7)
    for i, j in ((0, 0), (2, 3), (4, 1)):
        (w0, b0), (w1, b1) = ((w.astype(np.float64), b) for w, b in layers)
        value = np.sin(2.5 * (encoding[:, i, j] @ w0 + b0)) @ w1 + b1
        window = np.exp(-np.hypot(i - 2, j - 3) * np.abs(delta.astype(np.float64)) / 7) + shift
        np.testing.assert_allclose(kernel[:, i, j], value * window, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((9, 5), F32)}, ValueError, r"x: got shape \(9, 5\)"),
        ({"causal": True}, ValueError, "causal: got True for a map"),
        ({"w_in": np.zeros((5, 10), F32)}, ValueError, r"w_in: got shape \(5, 10\)"),
        ({"short": np.zeros((15, 3), F32)}, ValueError, r"short: got shape \(15, 3\)"),
        ({"kernel": np.zeros((5, 13), F32)}, ValueError, r"kernel: got shape \(5, 13\)"),
        ({"norm": 1}, TypeError, "norm: got int"),
        ({"precision": "half"}, ValueError, "precision: got 'half'"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    with pytest.raises(error, match=message):
        hyena_pixel_conv(**(inputs(rng) | change))


def test_bad_networks(rng):
    z = normal(rng, (3, 5, 7))
    with pytest.raises(ValueError, match="encoding: got shape"):
        hyena_pixel_kernel(z[0, 0], [], 1.0, z, z)
    with pytest.raises(TypeError, match="layers: got"):
        hyena_pixel_kernel(z, [], 1.0, z, z)
    with pytest.raises(ValueError, match=r"layers\[0\] weight: got shape \(4, 4\)"):
        hyena_pixel_kernel(z, [(np.zeros((4, 4)), np.zeros(4))], 1.0, z, z)
