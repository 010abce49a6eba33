"""What every index must do, whatever it keeps: follow its store, be copied and saved, refuse keys it cannot rank."""

import numpy as np
import pytest

import longattn as la
import tolerances
from random_arrays import F32
from random_stores import queries, rows, store_of
from running import on_threads


def answer(index, store, *, seed=5, **call):
    """What a call on this index gives, as arrays that can be compared."""
    q = queries(np.random.default_rng(seed), 2 * store.kv_heads, dim=store.head_dim)
    call = {"top_k": 70, "sinks": 3, "window": 50, **call}
    result = la.retrieval_attention(q, store, index, return_selected=True, **call)
    picked = [row for head in result.stats.selected for row in head]
    return [result.out, result.lse, result.stats.missed_mass, result.stats.index_bytes, *picked]


def check_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def check_follows(make, *, count=3000, dtype=F32):
    """After any appends and truncates the index is the one that is built from nothing.

    Only for indexes that do not depend on how their rows came.
    """
    rng = np.random.default_rng(11)
    keys, values = rows(rng, 2, count, 24, 20)
    other_keys, other_values = rows(rng, 2, count, 24, 20)
    store = store_of(keys[:, :1], values[:, :1], dtype)
    index = make(store)
    index.update()
    held_keys, held_values = keys[:, :1], values[:, :1]

    def compare():
        fresh = store_of(held_keys, held_values, dtype)
        built = make(fresh)
        check_same(answer(index, store), answer(built, fresh))
        assert (len(index), index.nbytes) == (len(built), built.nbytes)

    def append(k, v):
        nonlocal held_keys, held_values
        store.append(k, v)
        held_keys, held_values = np.concatenate([held_keys, k], 1), np.concatenate([held_values, v], 1)

    def truncate(n):
        nonlocal held_keys, held_values
        store.truncate(n)
        held_keys, held_values = held_keys[:, :n], held_values[:, :n]

    for at in (70, 71, 600, 1500, count):
        append(keys[:, held_keys.shape[1] : at], values[:, held_keys.shape[1] : at])
        compare()
    # Truncated and other rows in their place, before the index looks again and after.
    for keep, to, look in ((count - 7, count, False), (1300, 2000, True), (1300, 1301, False), (64, 900, True)):
        truncate(keep)
        if look:
            index.update()
            assert len(index) <= keep
            compare()
        append(other_keys[:, keep:to], other_values[:, keep:to])
        compare()
    truncate(1)
    compare()


def check_fork(make):
    """A fork's index answers as one that is built on it, and neither follows the other's store."""
    rng = np.random.default_rng(12)
    store = store_of(*rows(rng, 2, 1800, 24, 20))
    index = make(store)
    index.update()
    fork = store.fork()
    store.append(*rows(rng, 2, 300, 24, 20))
    fork.truncate(1500)
    fork.append(*rows(rng, 2, 400, 24, 20))
    copy = index.fork(fork)
    assert type(copy) is type(index) and copy.store is fork and copy.parameters == index.parameters
    check_same(answer(copy, fork), answer(make(fork), fork))
    check_same(answer(index, store), answer(make(store), store))
    with pytest.raises(ValueError, match="store: got a store of its own, expected a fork"):
        index.fork(store_of(*rows(rng, 2, 100, 24, 20)))


def check_files(make, tmp_path, *, dtype=F32):
    """A loaded index answers as the one that was saved, and grows on like it."""
    rng = np.random.default_rng(13)
    for count in (0, 40, 1900):
        store = store_of(*rows(rng, 2, max(count, 1), 24, 20), dtype)
        store.truncate(count)
        index = make(store)
        index.update()
        index.save(tmp_path / "index")
        again = type(index).load(tmp_path / "index", store)
        assert again.parameters == index.parameters
        assert (len(again), again.nbytes, again.estimates) == (len(index), index.nbytes, index.estimates)
        store.append(*rows(rng, 2, 500, 24, 20))
        check_same(answer(index, store), answer(again, store))


def check_keys_that_are_not_finite(make):
    """They are named, nothing is answered with them, and without them all is well."""
    rng = np.random.default_rng(14)
    for bad in (np.nan, np.inf, -np.inf):
        keys, values = rows(rng, 2, 3000, 24, 20)
        keys[1, 777, 5] = bad
        store = store_of(keys, values)
        index = make(store)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"store: got NaN or infinity in key 777 of head 1, expected finite"):
                answer(index, store)
        store.truncate(777)
        check_same(answer(index, store), answer(make(store), store))


def check_values_that_are_not_finite(make):
    """NaN in a value reaches what gives it weight, and stays away from what left it out."""
    rng = np.random.default_rng(15)
    keys, values = rows(rng, 1, 2000, 24, 20)
    values[0, 600] = np.nan
    store = store_of(keys, values)
    index = make(store)
    q = queries(rng, 2, dim=24)
    q[:, 0] -= keys[0, 600] * (q[:, 0] @ keys[0, 600] + 200)[:, None] / (keys[0, 600] @ keys[0, 600])
    result = la.retrieval_attention(q, store, index, top_k=64, window=40, rest="none", return_selected=True)
    assert 600 not in result.stats.selected[0][0] and np.isfinite(result.out).all()


def check_threads_and_callers(make):
    """One index, several callers, and any number of threads: the same bits."""
    rng = np.random.default_rng(16)
    store = store_of(*rows(rng, 1, 6000, 24, 20), room=60_000)
    found = on_threads(lambda: answer(make(store), store, top_k=300))
    check_same(found[0], found[1])
    check_same(found[0], found[2])


def check_rounded(result, expected, q, s):
    """Close, where what is kept of units is rounded to the store's dtype."""
    unit = tolerances.ROUNDOFF[np.dtype(s.dtype)][0]
    logit = (
        unit * (np.abs(q.astype(np.float64)).sum(-1) * s.head_dim**-0.5).max() * np.abs(s.keys.astype(np.float64)).max()
    )
    exact = tolerances.attention(q, s.keys, s.values)
    value = np.abs(s.values.astype(np.float64)).max()
    np.testing.assert_allclose(result.lse, expected.lse, atol=2 * logit + exact.lse_atol)
    atol = (4 * logit + 2 * unit) * value + exact.atol
    np.testing.assert_allclose(result.out.astype(np.float64), expected.out, rtol=exact.rtol, atol=atol)
