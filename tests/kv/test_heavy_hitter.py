"""H2O: the kept rows are those of a plain simulation; attention is over them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tolerances
from eviction import cache_of, check, decode, dense, sequence
from longattn.kv.evict import HeavyHitter
from longattn.kv.evict.policy import weakest
from longattn.reference import kv as reference
from longattn.reference.dense import attention
from random_arrays import DTYPES


@pytest.mark.parametrize("residual", [None, "mean"])
@pytest.mark.parametrize("prompt", [0, 1, 12, 40])
@pytest.mark.parametrize(("heavy", "recent"), [(6, 4), (0, 5), (10, 1), (3, 30)])
def test_steps_are_those_of_a_simulation(rng, *, heavy, recent, prompt, residual):
    q, k, v = sequence(rng, heads=6)
    policy, model = HeavyHitter(heavy, recent), reference.HeavyHitter(heavy, recent)
    _, _, kept = check(policy, model, q, k, v, prompt=prompt, residual=residual)
    for step, heads in enumerate(kept, start=max(prompt - 1, 0)):
        for rows in heads:
            assert len(rows) == min(step + 1, heavy + recent)
            assert rows[-recent:] == list(range(step + 1))[-recent:]


def test_every_instruction_set(rng, isa):
    q, k, v = sequence(rng)
    check(HeavyHitter(6, 4), reference.HeavyHitter(6, 4), q, k, v, prompt=20, residual="mean")


@pytest.mark.parametrize("prompt", [0, 20])
def test_a_budget_of_the_whole_text_is_dense(rng, prompt):
    q, k, v = sequence(rng)
    out, kept = decode(cache_of(HeavyHitter(50, 10), k, v), q, k, v, prompt=prompt)
    tolerances.attention(q, k, v).check(out, dense(q, k, v))
    assert kept[-1] == [list(range(60))] * 2


def test_no_heavy_rows_leave_a_sliding_window(rng):
    q, k, v = sequence(rng)
    out, _ = decode(cache_of(HeavyHitter(0, 7), k, v), q, k, v)
    tolerances.attention(q, k, v).check(out, attention(q, k, v, causal=True, window=(7, -1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    q, k, v = sequence(rng, dtype=dtype)
    check(HeavyHitter(6, 4), reference.HeavyHitter(6, 4), q, k, v, prompt=30, residual="mean")


def test_options(rng):
    q, k, v = sequence(rng)
    options = {"scale": 0.4, "softcap": 3.0, "sinks": np.array([1.0, -2.0, 0.5, 3.0])}
    check(HeavyHitter(6, 4), reference.HeavyHitter(6, 4), q, k, v, prompt=30, **options)


def test_nan_counts_as_nothing(rng):
    """A key that is NaN makes outputs NaN while it is there, and goes first."""
    q, k, v = sequence(rng, length=20)
    k[0, 3] = np.nan
    cache = cache_of(HeavyHitter(2, 3), k, v)
    out, kept = decode(cache, q, k, v)
    assert np.isnan(out[0, 3]).all() and np.isfinite(out[:, 12:]).all()
    assert 3 not in kept[-1][0] and len(kept[-1][0]) == 5


@settings(max_examples=50)
@given(st.data())
def test_weakest(data):
    """Of random scores with ties, those that a sort says."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shape = 3, data.draw(st.integers(1, 9))
    scores, candidates = rng.integers(0, 4, shape).astype(float), rng.random(shape) < 0.7
    ages = np.argsort(rng.random(shape), axis=1)
    counts = np.array([rng.integers(-1, c + 1) for c in candidates.sum(axis=1)])
    if data.draw(st.booleans()):
        counts = np.minimum(counts, 1)
    mask = weakest(scores, candidates, counts, ages)
    expected = np.zeros(shape, bool)
    for h in range(3):
        order = sorted(np.flatnonzero(candidates[h]), key=lambda i: (scores[h, i], ages[h, i]))
        expected[h, order[: max(counts[h], 0)]] = True
    assert (mask is None and not expected.any()) or (mask == expected).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HeavyHitter(-1, 1), ValueError, "heavy: got -1, expected at least 0"),
        (lambda: HeavyHitter(4, 0), ValueError, "recent: got 0, expected at least 1"),
        (lambda: HeavyHitter("4", 1), TypeError, "heavy: got '4', expected an integer"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
