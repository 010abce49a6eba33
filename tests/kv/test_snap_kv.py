"""SnapKV: of a prompt, what its last queries look at; everything after it."""

import numpy as np
import pytest

import tolerances
from eviction import cache_of, check, decode, dense, sequence
from longattn.kv.evict import SnapKV
from longattn.reference import kv as reference
from longattn.reference.dense import attention_weights
from random_arrays import DTYPES


@pytest.mark.parametrize("residual", [None, "mean"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(("pooling", "kernel"), [("avg", 5), ("max", 7), ("avg", 1), ("max", 3)])
def test_steps_are_those_of_a_simulation(rng, *, pooling, kernel, reduce, residual):
    q, k, v = sequence(rng, heads=6)
    options = {"window": 6, "kernel": kernel, "pooling": pooling, "reduce": reduce}
    check(SnapKV(16, **options), reference.SnapKV(16, **options), q, k, v, prompt=50, residual=residual)


def test_every_instruction_set(rng, isa):
    q, k, v = sequence(rng)
    options = {"scale": 0.4, "softcap": 3.0, "sinks": np.array([1.0, -2.0, 0.5, 3.0])}
    check(SnapKV(16, window=6), reference.SnapKV(16, window=6), q, k, v, prompt=50, **options)


@pytest.mark.parametrize("prompt", [0, 10, 16])
def test_a_prompt_within_the_budget_is_kept_whole(rng, prompt):
    q, k, v = sequence(rng)
    out, kept = decode(cache_of(SnapKV(16, window=6), k, v), q, k, v, prompt=prompt)
    tolerances.attention(q, k, v).check(out, dense(q, k, v))
    assert kept[-1] == [list(range(60))] * 2


def test_without_pooling_the_window_votes(rng):
    q, k, v = sequence(rng)
    _, kept = decode(cache_of(SnapKV(16, window=6, kernel=1), k, v), q, k, v, prompt=50)
    votes = attention_weights(q[:, :50], k[:, :50], range(44, 50), causal=True)[..., :44].sum(axis=1)
    for head in range(2):
        best = np.argsort(-votes[2 * head : 2 * head + 2].mean(axis=0))[:10]
        assert kept[0][head] == [*sorted(best.tolist()), *range(44, 50)]


def test_what_is_kept(rng):
    q, k, v = sequence(rng)
    cache = cache_of(SnapKV(16, window=6), k, v, room=10)
    _, kept = decode(cache, q, k, v, prompt=50)
    for step, heads in enumerate(kept, start=49):
        for rows in heads:
            assert len(rows) == 16 + step - 49 and rows[-(step - 43) :] == list(range(44, step + 1))
    with pytest.raises(ValueError, match="no more than its 0 free slots of 26"):
        cache.append(k[:, :1], v[:, :1])


def test_neighbours_come_along(rng):
    """Where one key has all the votes, pooling keeps the keys around it."""
    q, k, v = sequence(rng, heads=1, kv_heads=1)
    k[0, 20] = 30 * q[0, 49] / np.linalg.norm(q[0, 49])
    q[0, 44:50] = q[0, 49]
    _, kept = decode(cache_of(SnapKV(11, window=6, kernel=5), k, v), q, k, v, prompt=50)
    assert kept[0][0] == [*range(18, 23), *range(44, 50)]


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_a_kernel_over_all_keys_pools_as_any_larger_one(rng, pooling):
    q, k, v = sequence(rng)
    kept = [
        decode(cache_of(SnapKV(16, window=6, kernel=kernel, pooling=pooling), k, v), q, k, v, prompt=50)[1]
        for kernel in (101, 2**63 - 1)
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    q, k, v = sequence(rng, dtype=dtype, value_dim=8)
    check(SnapKV(16, window=6), reference.SnapKV(16, window=6), q, k, v, prompt=50)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SnapKV(32), ValueError, "budget: got 32, expected at least 33"),
        (lambda: SnapKV(64, kernel=4), ValueError, "kernel: got 4, expected an odd number"),
        (lambda: SnapKV(64, pooling="sum"), ValueError, "pooling: got 'sum', expected '"),
        (lambda: SnapKV(64, reduce="sum"), ValueError, "reduce: got 'sum', expected 'mean' or 'max'"),
        (lambda: SnapKV(64, window=0), ValueError, "window: got 0, expected at least 1"),
        (lambda: SnapKV(64.0), TypeError, "budget: got 64.0, expected an integer"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
