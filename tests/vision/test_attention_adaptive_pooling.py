"""`attention_adaptive_pooling`: likely matches, and points that are attended to as much."""

import numpy as np
import pytest

from longattn.vision.attention_adaptive_pooling import (
    METHOD,
    attention_adaptive_pooling,
    pool_keypoints,
)
from random_arrays import DTYPES, F32, normal


def case(rng, n0=50, n1=43, dtype=F32):
    a, b = (normal(rng, (4, n, 16), dtype, spread=1.5) for n in (n0, n1))
    z = rng.random((n0 + 1, n1 + 1)) ** 6
    return z, ((a, a), (b, b)), ((b, a), (a, b))


@pytest.mark.parametrize("options", [{}, {"threshold": 6.0}, {"threshold": 4.0, "uncertainty": 1.6, "scale": 0.5}])
@pytest.mark.parametrize("least", [0, 45, 256])
def test_reference(rng, isa, least, options):
    given = case(rng)
    found, expected = (f(*given, least=least, **options) for f in (attention_adaptive_pooling, METHOD.reference))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, threads, dtype):
    given = case(rng, dtype=dtype)
    found, expected = (f(*given, least=0, threshold=6.0) for f in (attention_adaptive_pooling, METHOD.reference))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_threshold_of_0_keeps_all(rng):
    found = attention_adaptive_pooling(*case(rng), threshold=0.0, least=0)
    assert [len(x) for x in found] == [50, 43]


def test_few_points_stay(rng):
    found = attention_adaptive_pooling(*case(rng), threshold=9.0, least=50)
    assert [len(x) for x in found] == [50, 43]


def test_equal_weights_keep_all(rng, isa):
    z, layers, crossing = case(rng)
    layers, crossing = ([tuple(np.zeros_like(x) for x in pair) for pair in both] for both in (layers, crossing))
    threshold = float(np.sort(z[:-1, :-1].sum(axis=1))[-2])
    found = attention_adaptive_pooling(z, layers, crossing, threshold=threshold, least=0)
    assert len(found[0]) == 50


def test_likely_matches_stay(rng):
    z, *layers = case(rng)
    likely = [z[:-1, :-1].sum(axis=axis) for axis in (1, 0)]
    before = [51, 44]
    for threshold in (3.0, 5.0, 6.0, 7.0):
        found = attention_adaptive_pooling(z, *layers, threshold=threshold, least=0)
        for image in range(2):
            sure = np.flatnonzero(likely[image] >= threshold)
            assert set(sure) <= set(found[image])
            assert len(sure) <= before[image]
            before[image] = len(sure)


def test_the_middle_of_an_even_number(rng):
    sure = np.array([1.0, 1, 1, 1, 0, 0])
    weights = np.array([0.1, 0.2, 0.3, 0.4, 0.2, 0.15])
    assert pool_keypoints(sure, weights, np.zeros(6), threshold=0.5, least=0).tolist() == [0, 1, 2, 3, 4, 5]
    assert pool_keypoints(sure, weights, 1 - weights, threshold=0.5, least=0).tolist() == [0, 1, 2, 3, 4, 5]
    low = np.array([0.5, 0.5, 0.5, 0.5, 0.2, 0.1])
    assert pool_keypoints(sure, weights, low, threshold=0.5, least=0).tolist() == [0, 1, 2, 3, 4]


def test_torch(rng):
    torch = pytest.importorskip("torch")
    z, *layers = case(rng)
    tensors = [tuple(tuple(torch.from_numpy(x) for x in pair) for pair in both) for both in layers]
    for ours, theirs in zip(
        attention_adaptive_pooling(torch.from_numpy(z), *tensors, threshold=6.0, least=0),
        attention_adaptive_pooling(z, *layers, threshold=6.0, least=0),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"uncertainty": 0.0}, ValueError, r"uncertainty: got 0.0"),
        ({"least": -1}, ValueError, r"least: got -1"),
        ({"assignment": np.zeros((0, 3))}, ValueError, r"assignment: got shape \(0, 3\)"),
        ({"assignment": np.zeros((50, 44))}, ValueError, r"self_layers\[0\]: got shapes"),
        ({"self_layers": 3}, TypeError, r"self_layers: got int"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    z, layers, crossing = case(rng)
    with pytest.raises(error, match=message):
        attention_adaptive_pooling(**({"assignment": z, "self_layers": layers, "cross_layers": crossing} | change))
