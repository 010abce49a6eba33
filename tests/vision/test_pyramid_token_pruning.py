"""`pyramid_token_pruning`: budgets of regions, filled by token."""

import numpy as np
import pytest

from longattn.vision.pyramid_token_pruning import METHOD, pyramid_token_pruning
from random_arrays import BF16, F16, F32


def case(rng, regions=5, tokens=24):
    return rng.standard_normal(regions), rng.random((regions, tokens)), rng.random((regions, tokens))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("keep", "alpha", "tau"), [(0.0, 0.5, 1.0), (0.1, 0.5, 1.0), (0.5, 0.2, 0.1), (0.9, 1.0, 2.0)])
def test_reference(rng, told, keep, alpha, tau):
    given = case(rng)[: 3 if told else 2]
    options = {"keep": keep, "alpha": alpha, "tau": tau}
    found = pyramid_token_pruning(*given, **options)
    np.testing.assert_array_equal(found, METHOD.reference(*given, **options))
    assert len(found) == round(keep * 120)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_dtypes(rng, dtype):
    given = [x.astype(dtype) for x in case(rng)]
    np.testing.assert_array_equal(pyramid_token_pruning(*given, keep=0.3), METHOD.reference(*given, keep=0.3))


def test_everything(rng):
    np.testing.assert_array_equal(pyramid_token_pruning(*case(rng), keep=1.0), np.arange(120))


def test_without_the_instruction(rng):
    regions, own, told = case(rng)
    np.testing.assert_array_equal(
        pyramid_token_pruning(regions, own, told, keep=0.3, alpha=1.0), pyramid_token_pruning(regions, own, keep=0.3)
    )


def test_equal_regions(rng):
    _, own, told = case(rng)
    found = pyramid_token_pruning(np.full(5, 0.3), own, told, keep=0.25)
    assert np.bincount(found // 24, minlength=5).tolist() == [6] * 5


def test_one_region_is_top_k(rng):
    own = rng.random((1, 40))
    found = pyramid_token_pruning(np.zeros(1), own, keep=0.25, alpha=1.0)
    np.testing.assert_array_equal(found, np.sort(np.argsort(-own[0])[:10]))


def test_a_region_without_weight(rng):
    regions, own, _ = case(rng)
    own[2] = 0
    found = pyramid_token_pruning(np.zeros(5), own, keep=0.5)
    np.testing.assert_array_equal(found[found // 24 == 2], 48 + np.arange(12))
    assert regions.size == 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": 1.5}, ValueError, r"keep: got 1.5"),
        ({"alpha": -0.5}, ValueError, r"alpha: got -0.5"),
        ({"tau": 0.0}, ValueError, r"tau: got 0.0"),
        ({"region_scores": np.zeros(0)}, ValueError, r"region_scores: got none"),
        ({"token_scores": np.zeros((4, 3))}, ValueError, r"token_scores: got shape \(4, 3\)"),
        ({"token_scores": -np.ones((5, 24))}, ValueError, r"token_scores: got -1.0"),
        ({"instruction_scores": np.zeros((5, 23))}, ValueError, r"instruction_scores: got shape \(5, 23\)"),
        ({"token_scores": np.zeros((5, 24), int)}, TypeError, r"token_scores: got dtype int64"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    regions, own, _ = case(rng)
    with pytest.raises(error, match=message):
        pyramid_token_pruning(**({"region_scores": regions, "token_scores": own, "keep": 0.5} | change))
