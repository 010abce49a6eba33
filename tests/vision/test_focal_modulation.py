"""`focal_modulation`: gated context from convolutions."""

import numpy as np
import pytest

from longattn.vision import focal_modulation
from longattn.vision.convolution import gelu
from longattn.vision.focal_modulation import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 7, 8, 6), levels=2, bias=True):
    c, dims = shape[-1], len(shape) - 2
    kernels = [normal(rng, (*(3 + 2 * n,) * dims, c)) / (3 + 2 * n) for n in range(levels)]
    return (
        normal(rng, shape), weights(rng, c, 2 * c + levels + 1, bias), kernels,
        weights(rng, c, c, bias), weights(rng, c, 5, bias),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "levels"), [((2, 7, 8, 6), 2), ((1, 3, 2, 6), 3), ((2, 9, 6), 2), ((1, 3, 4, 5, 6), 1), ((1, 4, 4, 6), 0)]
)
@pytest.mark.parametrize("more", [False, True])
def test_reference(rng, isa, shape, levels, more):
    options = {}
    if more:
        norm = (normal(rng, (6,)), normal(rng, (6,)))
        options = {"shift": weights(rng, 6, 6, True), "normalize_modulator": True, "norm": norm}
    check(METHOD, *arguments(rng, shape, levels), **options)


def test_causal(rng):
    check(METHOD, *arguments(rng, (2, 9, 6)), causal=True)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng))


def test_without_levels(rng):
    x, wf, kernels, wh, wo = arguments(rng, levels=0, bias=False)
    every = x @ wf
    context = every[..., 12:] * gelu(every[..., 6:12].mean(axis=(1, 2), keepdims=True))
    expected = (every[..., :6] * (context @ wh)) @ wo
    same(METHOD, focal_modulation(x, wf, kernels, wh, wo), expected, x, wf, kernels, wh, wo)


def test_gates_of_zero(rng):
    x, (matrix, bias), kernels, wh, wo = arguments(rng)
    wf = (np.where(np.arange(15) < 12, matrix, 0).astype(F32), np.where(np.arange(15) < 12, bias, 0).astype(F32))
    expected = ((x @ wf[0][:, :6] + wf[1][:6]) * wh[1]) @ wo[0] + wo[1]
    same(METHOD, focal_modulation(x, wf, kernels, wh, wo), expected, x, wf, kernels, wh, wo)


def test_kernels_that_change_nothing(rng):
    x, wf, _, wh, wo = arguments(rng, bias=False)
    delta = [np.zeros((k, k, 6), F32) for k in (3, 5)]
    for kernel in delta:
        kernel[len(kernel) // 2, len(kernel) // 2] = 1
    every = x @ wf
    z1 = gelu(every[..., 6:12])
    z2 = gelu(z1)
    g = every[..., 12:]
    last = gelu(z2.mean(axis=(1, 2), keepdims=True))
    context = g[..., :1] * z1 + g[..., 1:2] * z2 + g[..., 2:] * last
    expected = (every[..., :6] * (context @ wh)) @ wo
    same(METHOD, focal_modulation(x, wf, delta, wh, wo), expected, x, wf, delta, wh, wo)


def test_shifted_images(rng):
    x, (matrix, bias), kernels, wh, wo = arguments(rng, (1, 12, 12, 6))
    matrix, bias = matrix.copy(), bias.copy()
    matrix[:, -1], bias[-1] = 0, 0
    one, two = (focal_modulation(a, (matrix, bias), kernels, wh, wo) for a in (x, np.roll(x, 1, axis=1)))
    same(METHOD, two[:, 5:8, 4:8], one[:, 4:7, 4:8], x[:, 5:8, 4:8], (matrix, bias), kernels, wh, wo)


def test_causal_looks_back_only(rng):
    x, *rest = arguments(rng, (1, 9, 6))
    other = x.copy()
    other[:, 5:] += 1
    one, two = (focal_modulation(a, *rest, causal=True) for a in (x, other))
    np.testing.assert_array_equal(one[:, :5], two[:, :5])
    assert (one[:, 5:] != two[:, 5:]).any(axis=-1).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"wf": np.zeros((6, 14))}, ValueError, r"wf: got shape \(6, 14\), expected \[6, 15\]"),
        ({"kernels": [np.zeros((2, 2, 6)), np.zeros((3, 3, 6))]}, ValueError, r"kernels\[0\]: got shape \(2, 2, 6\)"),
        ({"kernels": 3}, TypeError, r"kernels: got int"),
        ({"causal": True}, ValueError, r"causal: got True for 2 dimensions"),
        ({"norm": (np.zeros(5), np.zeros(6))}, ValueError, r"norm weight: got shape \(5,\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, wf, kernels, wh, wo = arguments(rng)
    raises(METHOD, error, message, {"x": x, "wf": wf, "kernels": kernels, "wh": wh, "wo": wo}, **change)
