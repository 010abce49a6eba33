"""MagicPIG: oracle, identities, and what sampling promises: chances as stated, sums unbiased."""

import re

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from longattn.vectors import synthetic
from random_arrays import DTYPES, F32, normal
from random_stores import queries, rows, store, store_of

magicpig = la.retrieval.magicpig_attention


def check(s, q, tables, bits, seed=0, **call):
    index = la.index.LshTables(s, tables, bits, seed=seed)
    result = magicpig(q, s, index, return_selected=True, **call)
    oracle = reference.magicpig_attention(q, s.keys, s.values, tables, bits, seed, len(index), **call)
    group = len(q) // s.kv_heads
    for h, of_head in enumerate(result.stats.selected):
        for i, picked in enumerate(of_head):
            of_group = [oracle.met[g][i] for g in range(h * group, (h + 1) * group)]
            np.testing.assert_array_equal(picked, np.unique(np.concatenate(of_group)))
    # Log weights come from a table: they err by less than 2e-4.
    tolerance = tolerances.attention(q, s.keys, s.values, scale=call.get("scale"))
    values = np.abs(np.asarray(s.values, np.float64)).max()
    np.testing.assert_allclose(result.out, oracle.out, atol=tolerance.atol + 4e-4 * values, rtol=tolerance.rtol)
    np.testing.assert_allclose(result.lse, oracle.lse, atol=tolerance.lse_atol + 2e-4)
    return result


@pytest.mark.parametrize("shape", [(20, 3, 4), (150, 10, 2), (255, 6, 5), (8, 0, 1), (30, 2, 9), (40, 16, 3)], ids=str)
def test_rows_and_weights(rng, isa, shape):
    tables, bits, group = shape
    s = store(rng, 2, 1000, 24, 20)
    check(s, queries(rng, 2 * group, 2, 24), tables, bits, sinks=3, window=40)


@pytest.mark.parametrize("dim", [1, 3, 17, 128])
def test_widths(rng, dim):
    s = store(rng, 2, 700, dim, 5)
    check(s, queries(rng, 4, 1, dim), 30, 3, seed=3, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    s = store(rng, 2, 700, 32, dtype=dtype)
    check(s, queries(rng, 4, 1, 32, dtype=dtype), 30, 4)


def test_a_scale_below_zero_looks_for_the_smallest_products(rng):
    s = store(rng, 2, 700, 16)
    check(s, queries(rng, 4, 1, 16), 30, 4, scale=-0.4)


def test_no_bits_are_attention(rng, isa):
    """Every row is met with certainty."""
    s, q = store(rng, 2, 900, 32), queries(rng, 6, 3, 32)
    result = magicpig(q, s, la.index.LshTables(s, 2, 0), window=10)
    oracle = reference.attention(q, s.keys, s.values, [[[]] * 3] * 2, 0)
    tolerances.attention(q, s.keys, s.values).check(result.out, oracle.out, result.lse, oracle.lse)
    assert (result.stats.missed_mass == 0).all()


def test_sums_are_unbiased_over_seeds(rng):
    """Numerator and denominator: the mean over seeds is within 4 standard errors of the truth, 5 numbers a head."""
    s = store(rng, 1, 640, 16, 4)
    q = queries(rng, 2, 1, 16, spread=1.0)
    truth = reference.attention(q, s.keys, s.values, [[[]]], 0)
    scale = np.exp(truth.lse[:, 0])
    sums = []
    for seed in range(400):
        result = magicpig(q, s, la.index.LshTables(s, 10, 3, seed=seed), window=8)
        denominator = np.exp(np.float64(result.lse[:, 0]))
        sums.append(
            np.concatenate([(denominator / scale)[:, None], result.out[:, 0] * (denominator / scale)[:, None]], 1)
        )
    sums = np.array(sums)
    expected = np.concatenate([np.ones((2, 1)), truth.out[:, 0]], axis=1)
    error = sums.std(axis=0) / 400**0.5
    assert (abs(sums.mean(axis=0) - expected) < 4 * error).all()
    # Not for want of noise: the test would see a bias of a few per cent.
    assert (error[:, 0] < 0.05).all() and (sums[:, :, 0].std(axis=0) > 0.05).all()


def test_rows_are_met_as_often_as_stated(rng):
    tables, bits, seeds = 12, 4, 300
    keys = normal(rng, (1, 640, 8))
    q = normal(rng, (1, 1, 8))
    s = store_of(keys, normal(rng, (1, 640, 2)))
    met = np.zeros(640)
    for seed in range(seeds):
        result = magicpig(q, s, la.index.LshTables(s, tables, bits, seed=seed), sinks=0, window=0, return_selected=True)
        met[result.stats.selected[0][0]] += 1
    moved = keys[0].astype(np.float64) - keys[0].mean(axis=0, dtype=np.float64)
    cosine = moved @ q[0, 0] / np.linalg.norm(moved, axis=-1) / np.linalg.norm(q)
    u = reference.inclusion(cosine, tables, bits)
    deviation = np.sqrt(u * (1 - u) * seeds)
    z = (met - u * seeds) / deviation
    certain = deviation > 2  # where the count is near normal
    assert certain.sum() > 100 and abs(z[certain]).max() < 5
    # One seed's directions are shared by all rows, so their errors are not independent: a generous bound.
    assert abs(met.sum() / seeds - u.sum()) < 5 * np.sqrt(deviation @ deviation) / seeds * 5


def test_the_length_of_queries_does_not_matter(rng):
    s, q = store(rng, 2, 900, 16), queries(rng, 4, 1, 16)
    index = la.index.LshTables(s, 20, 4)
    one, other = (
        magicpig(f * q, s, index, scale=0.25 / f, return_selected=True) for f in (np.float32(1), np.float32(8))
    )
    for h in range(2):
        np.testing.assert_array_equal(one.stats.selected[h][0], other.stats.selected[h][0])
    np.testing.assert_array_equal(one.out, other.out)


def test_moved_keys(rng):
    """The mean key is subtracted before keys are hashed, and the softmax does not see it."""
    keys, values = rows(rng, 2, 960, 16)
    keys = np.round(keys * 64) / 64
    moved = keys + rng.integers(-4, 5, (2, 1, 16)).astype(F32)
    q = queries(rng, 4, 1, 16)
    results = []
    for k in (keys, moved):
        s = store_of(k, values)
        results.append(magicpig(q, s, la.index.LshTables(s, 20, 4), return_selected=True))
    for h in range(2):
        np.testing.assert_array_equal(results[0].stats.selected[h][0], results[1].stats.selected[h][0])
    np.testing.assert_allclose(results[0].out, results[1].out, atol=1e-3)


def test_equal_keys_are_met_together(rng):
    keys, values = rows(rng, 2, 640, 16)
    keys[:, 320:] = keys[:, :320]
    s = store_of(keys, values)
    index = la.index.LshTables(s, 20, 4)
    result = magicpig(queries(rng, 4, 1, 16), s, index, sinks=0, window=0, return_selected=True)
    for h in range(2):
        picked = result.stats.selected[h][0]
        half = picked[picked < 320]
        np.testing.assert_array_equal(picked, np.concatenate([half, half + 320]))


def test_nothing_met(rng):
    """With neither sinks nor window, a query that meets no row sees nothing."""
    s, q = store(rng, 2, 640, 16), queries(rng, 4, 1, 16)
    index = la.index.LshTables(s, 2, 16)
    result = magicpig(q, s, index, sinks=0, window=0, return_selected=True)
    met = reference.magicpig_attention(q, s.keys, s.values, 2, 16, 0, sinks=0, window=0).met
    nothing = np.array([len(of_head[0]) == 0 for of_head in met])
    assert nothing.any()
    assert (result.out[nothing] == 0).all() and (result.lse[nothing] == -np.inf).all()


def test_a_limit_keeps_those_met_most(rng):
    s, q = store(rng, 2, 2000, 16), queries(rng, 4, 1, 16)
    index = la.index.LshTables(s, 40, 3)
    free = magicpig(q, s, index, return_selected=True)
    few = magicpig(q, s, index, return_selected=True, limit=50)
    keys = np.asarray(s.keys, np.float64)
    for h in range(2):
        picked = few.stats.selected[h][0]
        assert len(picked) == 50 and np.isin(picked, free.stats.selected[h][0]).all()
        k = reference.buckets(keys[h] - keys[h, : len(index)].mean(axis=0), 40, 3, 0)
        counts = [(k == reference.buckets(q[g, 0], 40, 3, 0)).sum(axis=-1) for g in (2 * h, 2 * h + 1)]
        total = sum(np.where(c >= 2, c, 0) for c in counts)
        among = free.stats.selected[h][0]
        order = among[np.argsort(-total[among], kind="stable")][:50]
        np.testing.assert_array_equal(picked, np.sort(order))
    every = magicpig(q, s, index, return_selected=True, limit=2000)
    np.testing.assert_array_equal(every.out, free.out)


def test_more_tables_err_less(rng):
    keys, values, q, _ = synthetic.head("synthetic", 0, 4096, 2, 0)
    s = store_of(keys[None], values[None])
    q = q[0][:, None].astype(F32)
    truth = reference.attention(q, s.keys, s.values, [[[]]], 0).out
    errors, read = [], []
    for tables in (20, 80, 250):
        results = [magicpig(q, s, la.index.LshTables(s, tables, 6, seed=seed)) for seed in range(5)]
        errors.append(np.mean([np.linalg.norm(r.out - truth, axis=-1).mean() for r in results]))
        read.append(np.mean([r.stats.fraction_attended for r in results]))
    assert errors[0] > errors[1] > errors[2] and read[0] < read[1] < read[2]


S, Q_ = store(np.random.default_rng(0), 2, 600, 16), queries(np.random.default_rng(1), 4, 1, 16)
INDEX = la.index.LshTables(S, 10, 3)

BAD = [
    ({"index": la.index.Collisions(S)}, TypeError, "index: got Collisions, expected an LshTables"),
    ({"index": la.index.LshTables(S.fork())}, ValueError, "index: got the index of another store"),
    ({"limit": 0}, ValueError, "limit: got 0, expected at least 1"),
    ({"limit": 2.0}, TypeError, "limit: got 2.0, expected an integer"),
    ({"store": None}, TypeError, "store: got NoneType"),
    ({"q": Q_[:3]}, ValueError, "q: got 3 heads"),
    ({"sinks": -1}, ValueError, "sinks: got -1"),
    ({"store": la.KVStore(2, 16, capacity=16)}, ValueError, "index: got the index of another store"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: re.sub(r"\s+", " ", str(x))[:40])
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        magicpig(**({"q": Q_, "store": S, "index": INDEX} | change))
