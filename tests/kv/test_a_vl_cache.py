"""A-VL: visual rows in two tiers, text rows as heavy hitters."""

import numpy as np
import pytest

import tolerances
from eviction import cache_of, check, decode, dense, sequence
from longattn.kv.evict import AVLCache, HeavyHitter, fastv_keep
from longattn.reference import kv as reference
from random_arrays import DTYPES

VISUAL = (np.arange(40) >= 5) & (np.arange(40) < 29)


@pytest.mark.parametrize("residual", [None, "mean"])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"core": 10, "secondary": 40, "text": 60, "refresh": 3},
        {"core": 25.0, "secondary": 25.0, "text": 30, "refresh": 2},
        {"core": 0, "secondary": 30, "text_budget": 7, "refresh": 4},
        {"core": 50, "secondary": 100, "text": 100, "refresh": 5},
    ],
    ids=str,
)
def test_steps_are_those_of_a_simulation(rng, case, residual):
    q, k, v = sequence(rng, heads=6)
    check(AVLCache(**case), reference.AVLCache(**case), q, k, v, prompt=40, residual=residual, visual=VISUAL)


def test_every_instruction_set(rng, isa):
    q, k, v = sequence(rng)
    options = {"scale": 0.4, "sinks": np.array([1.0, -2.0, 0.5, 3.0])}
    check(AVLCache(refresh=3), reference.AVLCache(refresh=3), q, k, v, prompt=40, visual=VISUAL, **options)


def test_whole_shares_are_dense(rng):
    q, k, v = sequence(rng)
    cache = cache_of(AVLCache(core=100, secondary=100, text=100), k, v)
    out, _ = decode(cache, q, k, v, prompt=40, visual=VISUAL)
    tolerances.attention(q, k, v).check(out, dense(q, k, v))


def test_a_refresh_of_one_reads_all_kept_visual_rows(rng):
    q, k, v = sequence(rng)
    case = {"core": 10, "secondary": 50, "refresh": 1}
    cache, _, kept = check(AVLCache(**case), reference.AVLCache(**case), q, k, v, prompt=40, visual=VISUAL)
    assert cache.stats.attended == len(kept[-2][0]) + 1


def test_core_steps_read_less(rng):
    q, k, v = sequence(rng)
    cache = cache_of(AVLCache(core=25, secondary=50, text=100, refresh=4), k, v)
    cache.prefill(q[:, :40], k[:, :40], v[:, :40], visual=VISUAL)
    read = []
    for i in range(40, 52):
        cache.append(k[:, i : i + 1], v[:, i : i + 1])
        cache.attend(q[:, i : i + 1])
        read.append(cache.stats.attended - (i - 40 + 17))
    assert read == [6, 6, 6, 12] * 3, "of 24 visual rows"
    assert len(cache.policy.core_rows) == 6


@pytest.mark.parametrize("prompt", [0, 30])
def test_without_visual_rows_it_is_heavy_hitters(rng, prompt):
    q, k, v = sequence(rng)
    one = decode(cache_of(AVLCache(text_budget=10), k, v), q, k, v, prompt=prompt)
    other = decode(cache_of(HeavyHitter(5, 5), k, v), q, k, v, prompt=prompt)
    assert one[1] == other[1]
    np.testing.assert_array_equal(one[0], other[0])


def test_what_is_read_in_place_is_a_copy_of_those_rows(rng, isa):
    q, k, v = sequence(rng)
    cache = cache_of(AVLCache(core=25, secondary=50, text=50, refresh=100), k, v)
    cache.prefill(q[:, :40], k[:, :40], v[:, :40], visual=VISUAL)
    cache.append(k[:, 40:41], v[:, 40:41])
    within = cache.policy.within(40)
    got = cache.store.attend(q[:, 40:41], within=within).out
    for head, mask in enumerate(within):
        rows = np.sort(cache.store.positions[head, mask])
        group = slice(2 * head, 2 * head + 2)
        expected = dense(q[group, 40:41], k[head : head + 1, rows], v[head : head + 1, rows])
        tolerances.attention(q, k, v).check(got[group], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    q, k, v = sequence(rng, dtype=dtype)
    check(AVLCache(refresh=3), reference.AVLCache(refresh=3), q, k, v, prompt=40, visual=VISUAL)


def test_rows_that_later_layers_keep():
    s = np.array([0.1, 0.5, 0.2, 0.9, 0.05, 0.3])
    visual = np.array([False, True, True, True, True, False])
    assert fastv_keep(s, visual, 50).tolist() == [0, 1, 3, 5]
    assert fastv_keep(s, visual, 0).tolist() == [0, 5]
    assert fastv_keep(s, visual, 100).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k: AVLCache(core=60), ValueError, "core: got 60, expected at most secondary, 50"),
        (lambda q, k: AVLCache(text=101), ValueError, "text: got 101, expected a percentage"),
        (lambda q, k: AVLCache(refresh=0), ValueError, "refresh: got 0"),
        (lambda q, k: AVLCache(secondary="all"), TypeError, "secondary: got 'all'"),
        (lambda q, k: cache_of(AVLCache(), k, k).prefill(q, k, k, visual=VISUAL), ValueError, "visual: got shape"),
        (lambda q, k: cache_of(AVLCache(), k, k).prefill(q, k, k, image=1), TypeError, "image: got an argument"),
        (lambda q, k: fastv_keep(np.ones(3), np.ones(4, bool), 50), ValueError, "visual: got shape"),
    ],
)
def test_bad_input(rng, call, error, message):
    q, k, _ = sequence(rng)
    with pytest.raises(error, match=message):
        call(q, k)


def test_visual_rows_come_in_the_prompt(rng):
    q, k, v = sequence(rng)
    cache = cache_of(AVLCache(), k, v)
    cache.prefill(q[:, :40], k[:, :40], v[:, :40], visual=VISUAL)
    with pytest.raises(ValueError, match="visual: got visual rows after the prompt"):
        cache.append(k[:, 40:41], v[:, 40:41], visual=np.array([True]))
