"""The exact scan against its oracle, and what it refuses."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from random_arrays import BF16, DTYPES, F32, normal
from random_stores import queries, rows, store, store_of


def picked(stats):
    return [[np.asarray(x) for x in head] for head in stats.selected]


#: (query heads, KV heads, rows, head_dim, value_dim, queries)
SHAPES = [(1, 1, 700, 32, 32, 1), (6, 2, 1003, 64, 16, 3), (5, 1, 640, 33, 1, 2), (2, 2, 530, 1, 7, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_picks_the_best_rows_there_are(rng, isa, shape, dtype):
    heads, kv_heads, count, dim, value_dim, n = shape
    s = store(rng, kv_heads, count, dim, value_dim, dtype=dtype)
    index = la.index.Flat(s)
    q = queries(rng, heads, n, dim)
    call = {"sinks": 3, "window": 50}
    result = la.retrieval_attention(q, s, index, top_k=40, rest="none", return_selected=True, **call)
    best = reference.best_rows(q, s.keys, 40, **call)
    for h in range(kv_heads):
        for i in range(n):
            # Rounding may swap rows of nearly the same share.
            assert len(np.intersect1d(result.stats.selected[h][i], best[h][i])) >= 39
    oracle = reference.attention(q, s.keys, s.values, result.stats.selected, count, **call)
    tolerances.attention(q, s.keys, s.values).check(result.out, oracle.out, result.lse, oracle.lse)
    # What is left out is known exactly, and so is its bound.
    np.testing.assert_allclose(result.stats.missed_mass, oracle.missed_mass, rtol=2e-3, atol=1e-6)
    assert (result.stats.missed_mass_bound >= result.stats.missed_mass).all()
    np.testing.assert_allclose(result.stats.missed_mass_bound, oracle.missed_mass, rtol=2e-3, atol=1e-5)
    among = np.array([len(reference.candidates(count - n + i + 1, count, **call)) for i in range(n)])
    assert (result.stats.keys_scored == among).all()
    assert index.nbytes == 0 and not index.estimates and len(index) == count


def test_threads_share_the_scan_of_one_group(rng, threads):
    s = store(rng, 1, 40_000, 16)
    q = queries(rng, 3, dim=16)
    result = la.retrieval_attention(q, s, la.index.Flat(s), top_k=100, return_selected=True)
    best = reference.best_rows(q, s.keys, 100)
    assert len(np.intersect1d(result.stats.selected[0][0], best[0][0])) >= 99
    assert (result.stats.keys_scored == 40_000 - 4 - 512).all()


@pytest.mark.parametrize("p", [0.3, 0.8, 0.99])
def test_top_p_is_of_the_exact_mass(rng, isa, p):
    s = store(rng, 2, 3000, 64, dtype=BF16)
    q = queries(rng, 4, dim=64, spread=2.0)
    result = la.retrieval_attention(q, s, la.index.Flat(s), top_p=p, window=64, return_selected=True)
    oracle = reference.attention(q, s.keys, s.values, result.stats.selected, 3000, window=64)
    assert (oracle.missed_mass <= 1 - p + 1e-5).all()
    # The fewest rows: one head of each group has just the mass (a bin of weights more at most).
    assert (oracle.missed_mass.reshape(2, 2).max(-1) > (1 - p) * 0.8 - 0.01).all()


def test_equal_rows_go_by_number(rng, isa):
    """Duplicates, constant keys and keys of zeros: ties go to the lower row."""
    keys, values = rows(rng, 1, 600, 16)
    keys[:, 100:500] = keys[:, 100:101]
    s = store_of(keys, values)
    q = 3 * keys[:, 100:101]
    result = la.retrieval_attention(q, s, la.index.Flat(s), top_k=50, sinks=0, window=0, return_selected=True)
    ties = np.intersect1d(result.stats.selected[0][0], np.arange(100, 500))
    np.testing.assert_array_equal(ties, np.arange(100, 100 + len(ties)))
    assert len(ties) >= 48
    for constant in (0.0, 1.0):
        s = store_of(np.full((2, 700, 8), constant, F32), normal(rng, (2, 700, 8)))
        call = {"top_k": 30, "sinks": 5, "window": 10, "return_selected": True}
        result = la.retrieval_attention(queries(rng, 4, dim=8), s, la.index.Flat(s), **call)
        for (selected,) in picked(result.stats):
            np.testing.assert_array_equal(selected, np.arange(5, 35))
        np.testing.assert_allclose(result.stats.missed_mass, 655 / 700, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_keys_that_are_not_finite_are_refused(rng, bad):
    keys, values = rows(rng, 2, 600, 16)
    s = store_of(keys, values)
    index = la.index.Flat(s)
    index.update()
    keys[1, 7, 3] = bad
    s.append(keys[:, :10], values[:, :10])
    with pytest.raises(ValueError, match="NaN or infinity in key 607 of head 1"):
        la.retrieval_attention(queries(rng, 2, dim=16), s, index, top_k=5)
    s.truncate(607)
    la.retrieval_attention(queries(rng, 2, dim=16), s, index, top_k=5)
    assert len(index) == 607


def test_fork_and_file(rng, tmp_path):
    s = store(rng, 2, 800, 16)
    index = la.index.Flat(s)
    index.update()
    forked = s.fork()
    index.save(tmp_path / "index")
    loaded = la.index.Flat.load(tmp_path / "index", s)
    copy = index.fork(forked)
    assert len(copy) == len(loaded) == 800
    q = queries(rng, 2, dim=16)
    results = [la.retrieval_attention(q, i.store, i, top_k=9).out for i in (index, copy, loaded)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    with pytest.raises(ValueError, match="a fork of the indexed store"):
        index.fork(store(rng, 2, 800, 16))


def test_no_estimate_of_the_rest(rng):
    s = store(rng, 1, 600, 16)
    with pytest.raises(ValueError, match="rest: got values with flat that estimate nothing"):
        la.retrieval_attention(queries(rng, 1, dim=16), s, la.index.Flat(s), top_k=5, rest="values")
    with pytest.raises(TypeError, match="store: got str"):
        la.index.Flat("store")
    coded = store_of(*rows(rng, 1, 100, 32), dtype="int8")
    with pytest.raises((TypeError, ValueError), match="store"):
        la.index.Flat(coded)
