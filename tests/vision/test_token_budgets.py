"""What methods that drop tokens share: weight received, budgets, the best of groups, the best that differ."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import vision as reference
from longattn.vision import budgeted_topk, diverse_topk, split_budget, token_mass
from random_arrays import qkv


def test_token_mass(rng, isa):
    q, k, _ = qkv(rng, batch=2, heads=4, kv_heads=2, rows=30, keys=30)
    weights = la.dense.attention_weights(q, k, range(30)).astype(np.float64)
    np.testing.assert_allclose(token_mass(q, k), weights.mean(axis=1).sum(axis=1), rtol=1e-5, atol=1e-6)
    rows = rng.random((2, 30)).astype(np.float32)
    expected = np.einsum("bhij,bi->bj", weights, rows) / 4
    np.testing.assert_allclose(token_mass(q, k, query_weights=rows), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("total", [0, 1, 7, 40, 80])
def test_split_budget(rng, total):
    shares = rng.random(8)
    budgets = split_budget(shares, total, capacity=10)
    assert budgets.sum() == total and budgets.max(initial=0) <= 10
    assert budgets.tolist() == reference.split_budget(shares, total, 10)


def test_equal_shares_get_equal_budgets():
    assert split_budget(np.full(7, 0.1), 70).tolist() == [10] * 7
    assert split_budget(np.full(3, 1 / 3), 8).tolist() == [3, 3, 2]
    assert split_budget(np.array([0.9, 0.1, 0.0]), 6, capacity=3).tolist() == [3, 3, 0]


def test_budgeted_topk(rng):
    values, groups = np.round(rng.random(60), 1), rng.integers(0, 4, 60)
    budgets = np.array([3, 0, 5, int((groups == 3).sum())])
    kept = budgeted_topk(values, groups, budgets)
    expected = []
    for g, count in enumerate(budgets):
        own = np.flatnonzero(groups == g)
        expected += own[np.argsort(-values[own], kind="stable")[:count]].tolist()
    assert kept.tolist() == sorted(expected)


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_diverse_topk(rng, power):
    values, vectors = rng.random(50), rng.standard_normal((50, 12))
    for count in (0, 1, 9, 50):
        expected = reference.diverse_topk(values, vectors, count, power)
        assert diverse_topk(values, vectors, count, power=power).tolist() == expected


def test_a_copy_adds_nothing(rng):
    vectors = np.repeat(rng.standard_normal((6, 8)), 2, axis=0)
    values = np.arange(12.0, 0, -1)
    assert diverse_topk(values, vectors, 6).tolist() == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: split_budget(np.array([-1.0, 2]), 3), ValueError, r"shares: got \[-1.0, 2.0\]"),
        (lambda: split_budget(np.zeros(2), 3), ValueError, r"shares: got"),
        (lambda: split_budget(np.ones(2), 7, capacity=3), ValueError, r"total: got 7, expected at most 6"),
        (lambda: budgeted_topk(np.ones(3), np.array([0, 1]), np.array([1, 1])), ValueError, r"groups: got shape"),
        (lambda: budgeted_topk(np.ones(3), np.array([0, 1, 2]), np.array([1, 1])), ValueError, r"groups: got shape"),
        (lambda: budgeted_topk(np.ones(2), np.array([0, 1]), np.array([2, 1])), ValueError, r"budgets: got \[2, 1\]"),
        (lambda: budgeted_topk(np.ones(2), np.ones(2), np.array([2, 1])), TypeError, r"groups: got dtype float64"),
        (lambda: diverse_topk(np.ones(3), np.ones((2, 4)), 1), ValueError, r"vectors: got shape \(2, 4\)"),
        (lambda: diverse_topk(-np.ones(3), np.ones((3, 4)), 1), ValueError, r"values: got -1.0"),
        (lambda: diverse_topk(np.ones(3), np.ones((3, 4)), 4), ValueError, r"count: got 4"),
        (lambda: diverse_topk(np.ones(3), np.ones((3, 4)), 2, power=-1.0), ValueError, r"power: got -1.0"),
        (lambda: diverse_topk(np.full(3, np.nan), np.ones((3, 4)), 2), ValueError, r"values: got NaN"),
        (lambda: token_mass(np.ones((2, 3, 4), np.float32), np.ones((2, 3, 4), np.float32)), ValueError, r"q: got sh"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_weight_received_is_within_rounding(rng, threads):
    q, k, _ = qkv(rng, rows=300, keys=300)
    assert abs(float(token_mass(q, k).sum()) - 300) < 300 * tolerances.SAFETY * tolerances.U * 20
