"""The budget of selective attention: rows of largest F go; attention is selective attention over the others."""

import numpy as np
import pytest

import longattn as la
import tolerances
from eviction import cache_of, check, decode, sequence
from longattn.kv.evict import SelectiveBudget
from longattn.reference import kv as reference
from longattn.reference.dense import selective_attention
from random_arrays import DTYPES


@pytest.mark.parametrize("prompt", [0, 1, 30])
@pytest.mark.parametrize(("budget", "protect"), [(8, 1), (5, 0), (12, 4), (2, 1)])
def test_steps_are_those_of_a_simulation(rng, *, budget, protect, prompt):
    q, k, v = sequence(rng, heads=6)
    options = {"selector_head": 3, "protect_first": protect}
    tolerance, _ = tolerances.selective(q, k, v)
    policy, model = SelectiveBudget(budget, **options), reference.SelectiveBudget(budget, **options)
    _, _, kept = check(policy, model, q, k, v, prompt=prompt, tolerance=tolerance)
    for step, heads in enumerate(kept, start=max(prompt - 1, 0)):
        assert heads[0] == heads[1] and len(heads[0]) == min(step + 1, budget)
        assert step in heads[0] and set(range(min(protect, step))) <= set(heads[0])


@pytest.mark.parametrize("prompt", [0, 20])
def test_a_budget_of_the_whole_text_is_selective_attention(rng, isa, prompt):
    q, k, v = sequence(rng)
    out, kept = decode(cache_of(SelectiveBudget(60), k, v), q, k, v, prompt=prompt)
    tolerance, _ = tolerances.selective(q, k, v)
    tolerance.check(out, selective_attention(q, k, v))
    tolerance.check(out, la.dense.selective_attention(q, k, v).astype(float))
    assert kept[-1] == [list(range(60))] * 2


def test_options(rng):
    q, k, v = sequence(rng)
    options = {"scale": 0.4, "softcap": 3.0}
    tolerance, _ = tolerances.selective(q, k, v, scale=0.4)
    check(SelectiveBudget(9), reference.SelectiveBudget(9), q, k, v, prompt=20, tolerance=tolerance, **options)


def test_with_a_mean_row(rng):
    q, k, v = sequence(rng)
    tolerance, _ = tolerances.selective(q, k, v)
    policy, model = SelectiveBudget(9), reference.SelectiveBudget(9)
    check(policy, model, q, k, v, prompt=20, residual="mean", tolerance=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    q, k, v = sequence(rng, dtype=dtype)
    tolerance, _ = tolerances.selective(q, k, v)
    check(SelectiveBudget(9), reference.SelectiveBudget(9), q, k, v, tolerance=tolerance)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k: SelectiveBudget(1), ValueError, "budget: got 1, expected at least 2"),
        (lambda q, k: SelectiveBudget(4, selector_head=-1), ValueError, "selector_head: got -1"),
        (
            lambda q, k: cache_of(SelectiveBudget(4, selector_head=9), k, k).prefill(q, k, k),
            ValueError,
            "selector_head: got 9, expected 0 to 3",
        ),
        (
            lambda q, k: cache_of(SelectiveBudget(4), k, k, sinks=np.zeros(4)).prefill(q, k, k),
            ValueError,
            "sinks: got sink logits",
        ),
    ],
)
def test_bad_input(rng, call, error, message):
    q, k, _ = sequence(rng)
    with pytest.raises(error, match=message):
        call(q, k)


def test_several_queries_are_refused(rng):
    q, k, v = sequence(rng)
    cache = cache_of(SelectiveBudget(4), k, v, slots=70)
    cache.append(k, v)
    with pytest.raises(ValueError, match="q: got 2 queries, expected one: what SelectiveBudget reads changes by step"):
        cache.attend(q[:, -2:])
