"""`zeroth_order_token_pruning`: tokens that a projector is sensitive to, as far as they differ."""

import math

import numpy as np
import pytest

from longattn.reference import vision as reference
from longattn.vision.zeroth_order_token_pruning import (
    METHOD,
    projector_sensitivity,
    zeroth_order_token_pruning,
)
from random_arrays import DTYPES, F32, normal
from vision_checks import weights


def case(rng, tokens=30, channels=12):
    return normal(rng, (2, tokens, channels)), [weights(rng, channels, 20, bias=True), weights(rng, 20, 16, bias=True)]


def exactly(layers):
    """The projector in float64."""

    def run(x):
        y = np.asarray(x, np.float64)
        for n, (matrix, bias) in enumerate(layers):
            if n:
                y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
            y = y @ matrix.astype(np.float64) + bias
        return y

    return run


@pytest.mark.parametrize("options", [{}, {"directions": 3, "seed": 5}, {"step": 0.1, "power": 2.0}, {"power": 0.0}])
def test_reference(rng, options):
    x, layers = case(rng)
    found = zeroth_order_token_pruning(x, layers, keep=10, **options)
    np.testing.assert_array_equal(found, METHOD.reference(x, exactly(layers), keep=10, **options))
    own = {name: value for name, value in options.items() if name != "power"}
    # Differences of numbers that are `step` apart lose that much of float32's digits.
    np.testing.assert_allclose(
        projector_sensitivity(x, layers, **own), reference.projector_sensitivity(x, exactly(layers), **own), rtol=1e-3
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    x, layers = case(rng)
    x = x.astype(dtype)
    found = zeroth_order_token_pruning(x, layers, keep=7)
    np.testing.assert_array_equal(found, METHOD.reference(x, exactly(layers), keep=7))


def test_a_function_and_tensors(rng):
    torch = pytest.importorskip("torch")
    x, layers = case(rng)
    expected = zeroth_order_token_pruning(x, layers, keep=7)
    np.testing.assert_array_equal(zeroth_order_token_pruning(x, exactly(layers), keep=7), expected)
    np.testing.assert_array_equal(zeroth_order_token_pruning(torch.from_numpy(x), layers, keep=7), expected)


@pytest.mark.parametrize("step", [0.001, 0.01, 1.0])
def test_linear_projectors_are_as_sensitive_everywhere(rng, step):
    x, _ = case(rng)
    w = weights(rng, 12, 8)
    found = projector_sensitivity(x, [w], step=step, directions=5)
    drawn = np.random.default_rng(0).standard_normal((5, 12)).astype(F32).astype(np.float64)
    np.testing.assert_allclose(found, np.linalg.norm(drawn @ w, axis=1).mean(), rtol=1e-3)


def test_all_tokens(rng):
    found = zeroth_order_token_pruning(*case(rng), keep=30)
    np.testing.assert_array_equal(found, [np.arange(30)] * 2)


def test_a_large_power_leaves_sensitivity(rng):
    x, layers = case(rng)
    sensitivity = projector_sensitivity(x, layers)
    found = zeroth_order_token_pruning(x, layers, keep=5, power=5000.0)
    for row, s in zip(found, sensitivity, strict=True):
        # Powers of what is far below the largest are 0, of which the first count.
        assert np.argmax(s) in row
    near = zeroth_order_token_pruning(x[:, :2], layers, keep=1, power=5000.0)
    np.testing.assert_array_equal(near[:, 0], np.argmax(sensitivity[:, :2], axis=1))


def test_copies_stay_out(rng):
    x, layers = case(rng, tokens=8)
    doubled = np.concatenate([x, x], axis=1)
    for row in zeroth_order_token_pruning(doubled, layers, keep=8):
        assert sorted(i % 8 for i in row) == list(range(8))


def test_a_token_of_zeros(rng):
    x, layers = case(rng)
    x[0, 3] = 0
    assert np.isfinite(projector_sensitivity(x, layers)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": 31}, ValueError, r"keep: got 31"),
        ({"directions": 0}, ValueError, r"directions: got 0"),
        ({"step": 0.0}, ValueError, r"step: got 0.0"),
        ({"power": -1.0}, ValueError, r"power: got -1.0"),
        ({"projector": 3}, TypeError, r"projector: got int"),
        ({"projector": [np.zeros((11, 4), F32)]}, ValueError, r"projector\[0\]: got shape \(11, 4\)"),
        ({"projector": lambda x: x[..., 0]}, ValueError, r"projector: got a result of shape"),
        ({"projector": lambda x: x * np.nan}, ValueError, r"projector: got a result that is not finite"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, layers = case(rng)
    with pytest.raises(error, match=message):
        zeroth_order_token_pruning(**({"x": x, "projector": layers, "keep": 5} | change))
