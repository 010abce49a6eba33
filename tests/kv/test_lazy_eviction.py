"""LazyEviction: the kept rows are those of a plain simulation of gaps between active steps."""

import numpy as np
import pytest

import tolerances
from eviction import cache_of, check, decode, dense, sequence
from longattn.kv.evict import LazyEviction
from longattn.reference import kv as reference
from random_arrays import DTYPES

CASES = [
    {"budget": 14, "window": 5, "alpha": 0.05},
    {"budget": 6, "window": 6, "alpha": 0.02, "reduce": "mean"},
    {"budget": 0.3, "window": 4, "alpha": 0.05, "h2_weight": -1.0},
    {"budget": 20, "window": 3, "alpha": 0.1, "reduce": "sum", "h2_weight": 0.0},
    {"budget": 24, "window": 4, "alpha": 0.05, "protect_prompt": True},
    {"budget": 6, "window": 4, "alpha": 0.05, "protect_prompt": True},
]


@pytest.mark.parametrize("prompt", [0, 17])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_are_those_of_a_simulation(rng, case, prompt):
    q, k, v = sequence(rng, heads=6)
    _, _, kept = check(LazyEviction(**case), reference.LazyEviction(**case), q, k, v, prompt=prompt)
    window = case["window"]
    for step, heads in enumerate(kept, start=max(prompt - 1, 0)):
        for rows in heads:
            assert rows[-window:] == list(range(step + 1))[-window:]


@pytest.mark.parametrize("residual", [None, "mean"])
def test_every_instruction_set(rng, isa, residual):
    q, k, v = sequence(rng)
    case, options = CASES[0], {"scale": 0.4, "sinks": np.array([1.0, -2.0, 0.5, 3.0])}
    check(LazyEviction(**case), reference.LazyEviction(**case), q, k, v, residual=residual, **options)


def test_a_budget_of_the_whole_text_is_dense(rng):
    q, k, v = sequence(rng)
    out, kept = decode(cache_of(LazyEviction(60, window=5), k, v), q, k, v, prompt=20)
    tolerances.attention(q, k, v).check(out, dense(q, k, v))
    assert kept[-1] == [list(range(60))] * 2


def test_a_window_of_one_is_greedy(rng):
    q, k, v = sequence(rng)
    case = {"budget": 9, "window": 1, "alpha": 0.05}
    cache, _, kept = check(LazyEviction(**case), reference.LazyEviction(**case), q, k, v)
    assert [len(rows) for step in kept[8:] for rows in step] == [9] * 2 * 52
    assert cache.store.slots == 10


def test_between_evictions_there_is_a_window_more(rng):
    q, k, v = sequence(rng)
    cache = cache_of(LazyEviction(12, window=5), k, v)
    _, kept = decode(cache, q, k, v)
    sizes = [len(heads[0]) for heads in kept]
    assert max(sizes) == 16 <= cache.store.slots == 17
    assert all(size == 12 for size in sizes[15::5])


def test_a_row_that_is_always_active_has_a_gap_of_one(rng):
    policy = LazyEviction(10, window=5, alpha=0.0)
    policy.start(1, 12)
    for step in range(8):
        policy.admit(np.array([[step]]), step)
        policy.observe((policy.positions >= 0).astype(np.float32), step)
    assert policy.longest_gap[0, :8].tolist() == [1] * 7 + [0]
    first = policy.scores(7) - 2 / (1 + np.exp(1.0))
    np.testing.assert_allclose(first[0, :7], 1.0)
    assert policy.scores(7)[0, 7] == 0


def test_what_comes_back_outlives_what_does_not():
    """A row that is active every ten steps stays, one that was active for a while goes."""
    policy = LazyEviction(5, window=4, alpha=0.5)
    policy.start(1, 60)
    for step in range(41):
        policy.admit(np.array([[step]]), step)
        seen = np.zeros((1, 60), np.float32)
        seen[0, 3] = step % 10 == 3
        seen[0, 5] = step < 9
        policy.observe(seen, step)
        mask = policy.choose(step) if step > 14 else None
        if mask is not None:
            policy.discard(mask)
    kept = policy.positions[policy.positions >= 0].tolist()
    assert sorted(kept) == [3, 37, 38, 39, 40]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    q, k, v = sequence(rng, dtype=dtype)
    check(LazyEviction(**CASES[0]), reference.LazyEviction(**CASES[0]), q, k, v, residual="mean")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LazyEviction(20), ValueError, "budget: got 20, expected at least 25"),
        (lambda: LazyEviction(1.5), ValueError, "budget: got 1.5, expected a number of rows or a share"),
        (lambda: LazyEviction(float("nan")), ValueError, "budget: got nan"),
        (lambda: LazyEviction("many"), TypeError, "budget: got 'many', expected an integer"),
        (lambda: LazyEviction(50, window=0), ValueError, "window: got 0"),
        (lambda: LazyEviction(50, alpha=-1.0), ValueError, "alpha: got -1.0, expected at least 0"),
        (lambda: LazyEviction(50, alpha=1e300), ValueError, "alpha: got 1e.300, expected a finite float32"),
        (lambda: LazyEviction(50, h2_weight=np.inf), ValueError, "h2_weight: got inf"),
        (lambda: LazyEviction(50, reduce="min"), ValueError, "reduce: got 'min'"),
        (lambda: LazyEviction(50, protect_prompt=1), TypeError, "protect_prompt: got 1"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
