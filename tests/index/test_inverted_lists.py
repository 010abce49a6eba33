"""Inverted lists: what they scan, how they follow their store, and what they refuse."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn import vectors
from longattn.reference import retrieval as reference
from random_arrays import BF16, DTYPES, F32, normal
from random_stores import queries, rows, store, store_of
from running import on_threads

CALL = {"sinks": 4, "window": 100, "return_selected": True}


def flat(q, s, top_k, **call):
    return la.retrieval_attention(q, s, la.index.Flat(s), top_k=top_k, **(CALL | call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_lists_are_the_exact_scan(rng, isa, dtype):
    s = store(rng, 2, 5003, 24, dtype=dtype)
    index = la.index.InvertedLists(s, lists=30, nprobe=30)
    q = queries(rng, 6, 2, 24)
    result = la.retrieval_attention(q, s, index, top_k=50, **CALL)
    exact = flat(q, s, 50)
    np.testing.assert_array_equal(la.retrieval.recall(result.stats.selected, exact.stats.selected), 1)
    np.testing.assert_array_equal(result.out, exact.out)
    np.testing.assert_array_equal(result.lse, exact.lse)
    among = np.array([[5003 - 104 - 1, 5003 - 104]])
    np.testing.assert_array_equal(result.stats.keys_scored, np.repeat(among + 30, 2, 0))


def test_fewer_lists_cost_less_and_find_less(rng, isa):
    made = vectors.load("synthetic", length=8192, groups=6, heads=["0"], seed=1)
    s = store_of(made.keys, made.values, BF16)
    recalls, scored = [], []
    for nprobe in (2, 8, 32, 64):
        index = la.index.InvertedLists(s, nprobe=nprobe)
        found = [la.retrieval_attention(x[:, None], s, index, top_k=50, **CALL) for x in made.queries]
        best = [flat(x[:, None], s, 50) for x in made.queries]
        pairs = zip(found, best, strict=True)
        recalls.append(np.mean([la.retrieval.recall(a.stats.selected, b.stats.selected) for a, b in pairs]))
        scored.append(np.mean([a.stats.keys_scored for a in found]))
    assert (np.diff(recalls) >= 0).all() and (np.diff(scored) > 0).all()
    assert recalls[0] < 0.9 and recalls[-1] == 1, recalls
    assert scored[0] < 1000, scored


def test_what_is_read_is_exact(rng, isa):
    s = store(rng, 2, 4500, 32)
    index = la.index.InvertedLists(s, nprobe=3)
    q = queries(rng, 4, dim=32)
    result = la.retrieval_attention(q, s, index, top_k=20, **CALL)
    oracle = reference.attention(q, s.keys, s.values, result.stats.selected, 4500, sinks=4, window=100)
    tolerances.attention(q, s.keys, s.values).check(result.out, oracle.out, result.lse, oracle.lse)
    assert all(len(picked) == 20 for (picked,) in result.stats.selected)


def test_a_budget_of_rows(rng):
    s = store(rng, 1, 8000, 16)
    q = queries(rng, 2, dim=16)
    few = la.index.InvertedLists(s, lists=50, probe_rows=200)
    result = la.retrieval_attention(q, s, few, top_k=20, **CALL)
    assert 200 + 50 <= result.stats.keys_scored[0, 0] < 1200
    # Never fewer rows than are asked for.
    result = la.retrieval_attention(q, s, few, top_k=3000, **CALL)
    assert result.stats.keys_scored[0, 0] >= 3000 and len(result.stats.selected[0][0]) == 3000


def test_small_stores_are_scanned(rng):
    s = store(rng, 2, 3000, 16)
    index = la.index.InvertedLists(s)
    q = queries(rng, 2, dim=16)
    result = la.retrieval_attention(q, s, index, top_k=30, **CALL)
    np.testing.assert_array_equal(result.out, flat(q, s, 30).out)
    assert (result.stats.keys_scored == 3000 - 104).all()
    assert len(index) == 0 and index.nbytes == 0


def test_growth_truncate_and_threads(rng, threads):
    s = store(rng, 2, 4096, 16, dtype=BF16)
    index = la.index.InvertedLists(s, nprobe=5)
    index.update()
    assert len(index) == 4096
    s.append(*rows(rng, 2, 255, 16))
    index.update()
    assert len(index) == 4096  # they wait
    s.append(*rows(rng, 2, 1, 16))
    index.update()
    assert len(index) == 4352
    s.truncate(4200)
    index.update()
    assert len(index) == 4200
    s.append(*rows(rng, 2, 6000, 16))
    index.update()
    assert len(index) == 10_200
    # Every row is in one list: with all of them probed nothing is missed.
    q = queries(rng, 2, dim=16)
    everything = la.retrieval_attention(q, s, index, top_k=10_000, **CALL)
    assert all(len(np.unique(x)) == 10_000 for (x,) in everything.stats.selected)
    s.truncate(1000)
    index.update()
    assert len(index) == 0
    np.testing.assert_array_equal(la.retrieval_attention(q, s, index, top_k=30, **CALL).out, flat(q, s, 30).out)


def test_the_same_lists_whatever_the_threads(rng):
    s = store(rng, 2, 9000, 16)
    q = queries(rng, 4, dim=16)
    results = on_threads(lambda: la.retrieval_attention(q, s, la.index.InvertedLists(s, nprobe=3), top_k=30, **CALL))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].out, other.out)
        np.testing.assert_array_equal(results[0].stats.keys_scored, other.stats.keys_scored)


def test_fork_and_file(rng, tmp_path):
    s = store(rng, 2, 5000, 16)
    index = la.index.InvertedLists(s, nprobe=4, lists=40, seed=3)
    index.update()
    index.save(tmp_path / "index")
    forked = s.fork()
    forked.truncate(4500)
    forked.append(*rows(rng, 2, 400, 16))
    copy, loaded = index.fork(forked), la.index.InvertedLists.load(tmp_path / "index", s)
    assert loaded.parameters == index.parameters == {"lists": 40, "nprobe": 4, "seed": 3}
    assert (len(loaded), loaded.nbytes) == (5000, index.nbytes)
    assert len(copy) == 4500
    q = queries(rng, 2, dim=16)
    one, other = (la.retrieval_attention(q, s, i, top_k=30, **CALL) for i in (index, loaded))
    np.testing.assert_array_equal(one.out, other.out)
    np.testing.assert_array_equal(one.stats.keys_scored, other.stats.keys_scored)
    la.retrieval_attention(q, forked, copy, top_k=30, **CALL)
    assert len(copy) == 4900


def test_equal_and_empty_keys(rng):
    for constant in (0.0, 1.0):
        s = store_of(np.full((1, 5000, 8), constant, F32), normal(rng, (1, 5000, 8)))
        result = la.retrieval_attention(queries(rng, 2, dim=8), s, la.index.InvertedLists(s), top_k=30, **CALL)
        assert len(result.stats.selected[0][0]) == 30 and np.isfinite(result.out).all()


def test_keys_that_are_not_finite_are_refused(rng):
    keys, values = rows(rng, 1, 4500, 16)
    keys[0, 4400, 2] = np.nan
    s = store_of(keys, values)
    index = la.index.InvertedLists(s)
    with pytest.raises(ValueError, match="NaN or infinity in key 4400 of head 0"):
        index.update()
    s.truncate(4400)
    index.update()
    assert len(index) == 4400


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lists": 0}, ValueError, "lists: got 0, expected 1 to 4096"),
        ({"lists": 5000}, ValueError, "lists: got 5000"),
        ({"lists": 2.5}, TypeError, "lists: got 2.5, expected an integer"),
        ({"nprobe": 0}, ValueError, "nprobe: got 0, expected at least 1"),
        ({"nprobe": True}, TypeError, "nprobe: got True"),
        ({"probe_rows": 0}, ValueError, "probe_rows: got 0, expected at least 1"),
        ({"probe_rows": "all"}, TypeError, "probe_rows: got 'all'"),
        ({"seed": -1}, ValueError, "seed: got -1"),
    ],
)
def test_bad_arguments(rng, arguments, error, message):
    with pytest.raises(error, match=message):
        la.index.InvertedLists(store(rng, 1, 20, 8), **arguments)


def test_no_budget_of_mass_and_no_estimate_of_the_rest(rng):
    s = store(rng, 1, 600, 16)
    index, q = la.index.InvertedLists(s), queries(rng, 1, dim=16)
    with pytest.raises(ValueError, match="top_p: got an index of inverted_lists that estimates nothing"):
        la.retrieval_attention(q, s, index, top_p=0.5)
    with pytest.raises(ValueError, match="rest: got values with inverted_lists"):
        la.retrieval_attention(q, s, index, top_k=5, rest="values")
    assert (la.retrieval_attention(q, s, index, top_k=5).stats.missed_mass == 1).all()
