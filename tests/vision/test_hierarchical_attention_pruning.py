"""`hierarchical_attention_pruning`: anchors, their neighbours, and what deep layers look at."""

import numpy as np
import pytest

import longattn as la
from longattn.reference import vision as reference
from longattn.vision import cls_attention, token_mass
from longattn.vision.hierarchical_attention_pruning import (
    METHOD,
    hierarchical_attention_pruning,
    pick_hierarchical,
)
from random_arrays import DTYPES, F32, qkv


def layers(rng, tokens=49, prefix=1, dtype=F32):
    size = {"batch": 2, "heads": 4, "kv_heads": 4, "rows": tokens + prefix, "keys": tokens + prefix}
    return [qkv(rng, **size, q_dtype=dtype, spread=2.0)[:2] for _ in range(2)]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(("budget", "alpha"), [(0, 0.1), (9, 1.0), (20, 0.5), (20, 5.0), (49, 0.1)])
def test_reference(rng, isa, budget, alpha, prefix):
    given, options = layers(rng, prefix=prefix), {"budget": budget, "width": 7, "alpha": alpha, "prefix": prefix}
    found = hierarchical_attention_pruning(*given, **options)
    assert found.shape == (2, budget)
    np.testing.assert_array_equal(found, METHOD.reference(*given, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, threads, dtype):
    given = layers(rng, dtype=dtype)
    found = hierarchical_attention_pruning(*given, budget=15, width=7, alpha=1.0)
    np.testing.assert_array_equal(found, METHOD.reference(*given, budget=15, width=7, alpha=1.0))


@pytest.mark.parametrize("width", [1, 5, 12])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0, 5.0])
def test_pick(rng, width, alpha):
    for budget in range(0, 61, 6):
        a, b = rng.random((2, 60))
        found = pick_hierarchical(a, b, budget=budget, width=width, alpha=alpha)
        assert found.tolist() == reference.pick_hierarchical(a, b, budget, width, alpha)


def test_without_anchors_the_deep_layer_decides(rng, isa):
    given = layers(rng)
    found = hierarchical_attention_pruning(*given, budget=12, width=7, alpha=0.0)
    deep = token_mass(*given[1])[:, 1:]
    np.testing.assert_array_equal(found, np.sort(np.argsort(-deep, axis=1)[:, :12], axis=1))


def test_all_tokens(rng):
    found = hierarchical_attention_pruning(*layers(rng), budget=49, width=7)
    np.testing.assert_array_equal(found, [np.arange(49)] * 2)


def test_as_many_as_the_budget(rng):
    for budget in range(50):
        found = hierarchical_attention_pruning(*layers(rng), budget=budget, width=7, alpha=3.0)
        assert all(len(set(row)) == budget for row in found)


def test_the_first_of_equal_ones(rng, isa):
    given = [tuple(np.zeros_like(x) for x in pair) for pair in layers(rng)]
    found = hierarchical_attention_pruning(*given, budget=10, width=7, alpha=0.0)
    np.testing.assert_array_equal(found, [np.arange(10)] * 2)


def test_by_the_class_token(rng, isa):
    """The variant that looks at the class token's row alone is the same choice from its weights."""
    given = layers(rng)
    rows = [cls_attention(*pair) for pair in given]
    weights = [la.dense.attention_weights(*pair, [0]).mean(axis=1)[:, 0, 1:].astype(np.float64) for pair in given]
    for b in range(2):
        found = pick_hierarchical(rows[0][b], rows[1][b], budget=15, width=7, alpha=1.0)
        assert found.tolist() == reference.pick_hierarchical(weights[0][b], weights[1][b], 15, 7, 1.0)


def test_more_neighbours_than_the_budget():
    middle = np.zeros(25)
    middle[[12, 6]] = 2, 1
    assert pick_hierarchical(middle, np.zeros(25), budget=2, width=5, alpha=5.0).tolist() == [6, 12]
    assert pick_hierarchical(middle, np.zeros(25), budget=3, width=5, alpha=3.0).tolist() == [1, 6, 12]


def test_torch(rng):
    torch = pytest.importorskip("torch")
    given = layers(rng)
    tensors = [tuple(torch.from_numpy(x) for x in pair) for pair in given]
    options = {"budget": 15, "width": 7, "alpha": 1.0}
    np.testing.assert_array_equal(
        hierarchical_attention_pruning(*tensors, **options), hierarchical_attention_pruning(*given, **options)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 50}, ValueError, r"budget: got 50"),
        ({"width": 0}, ValueError, r"width: got 0"),
        ({"alpha": 6.0}, ValueError, r"alpha: got 6.0"),
        ({"object_layer": 3}, TypeError, r"object_layer: got int"),
        ({"deep_layer": (np.zeros((2, 4, 9, 16), F32),) * 2}, ValueError, r"deep_layer: got \(2, 8\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    first, second = layers(rng)
    given = {"object_layer": first, "deep_layer": second, "budget": 9, "width": 7}
    with pytest.raises(error, match=message):
        hierarchical_attention_pruning(**(given | change))
