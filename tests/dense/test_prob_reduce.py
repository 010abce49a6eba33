"""Sums over weights against their float64 reference, and the identities between them."""

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longattn as la
import tolerances
from longattn import _core
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F32, LAYOUTS, normal, qkv
from running import on_threads, running_on
from score_options import options_for

EVERYTHING = {"column_mass": True, "column_max": True, "entropy": True, "distance_moments": 4, "row_max": True}


def check(q, k, *, offset=0.0, options=None, **wanted):
    """Compare everything that is wanted with the reference."""
    options = options or {}
    actual = la.dense.prob_reduce(q, k, **wanted, **options)
    expected = reference.prob_reduce(q, k, **wanted, **options)
    for name in actual.__dataclass_fields__:
        a, e = getattr(actual, name), getattr(expected, name, None)
        assert (a is None) == (e is None), name
        if a is not None:
            assert a.shape == e.shape and a.dtype == (np.int64 if name == "row_max_key" else np.float32), name
    tolerance = tolerances.weights(q, k, scale=options.get("scale"), offset=offset)
    rows, keys = range(q.shape[-2]), k.shape[-2]
    p = reference.attention_weights(q, k, rows, lse=wanted.get("lse"), **options)
    if "lse" in wanted:
        np.testing.assert_array_equal(actual.lse, wanted["lse"])
    else:
        np.testing.assert_allclose(actual.lse, expected.lse, rtol=tolerances.U, atol=tolerance.rtol, err_msg="lse")
    if actual.column_mass is not None:
        w = np.abs(wanted.get("query_weights", np.ones(q.shape[-2])))
        size = (w[..., None] * p).sum(axis=-2)
        tolerance.check_sums(actual.column_mass, expected.column_mass, size)
    if actual.column_max is not None:
        tolerance.check(actual.column_max, expected.column_max)
    if actual.segment_mass is not None:
        tolerance.check_sums(actual.segment_mass, expected.segment_mass, expected.segment_mass)
    if actual.entropy is not None:
        # An error of ln P counts once for P itself and once for its factor ln P.
        size = (p * (1 - np.log(np.where(p > 0, p, 1.0)))).sum(axis=-1)
        tolerance.check_sums(actual.entropy, expected.entropy, size, factor_errors=2)
    if actual.distance_moments is not None:
        d = np.abs(np.arange(len(rows))[:, None] + keys - len(rows) - np.arange(keys)).astype(float)
        d = np.minimum(d, wanted.get("distance_limit", np.inf))
        sizes = [(p * d ** (m + 1)).sum(axis=-1) for m in range(wanted["distance_moments"])]
        tolerance.check_sums(
            actual.distance_moments, expected.distance_moments, np.stack(sizes, axis=-1), factor_errors=5
        )
    if actual.row_max is not None:
        tolerance.check(actual.row_max, expected.row_max)
        key = np.asarray(actual.row_max_key)
        at = np.take_along_axis(p, np.maximum(key, 0)[..., None], axis=-1)[..., 0] if keys else expected.row_max
        assert ((key >= 0) == (expected.row_max > 0))[expected.row_max > tolerance.SMALLEST].all()
        tolerance.check(actual.row_max[key >= 0], at[key >= 0])
    return actual


def segments(rng, keys, count=5):
    """Random ids, some in runs, some -1."""
    return np.repeat(rng.integers(-1, count, keys // 3 + 1), 3)[:keys]


@pytest.mark.parametrize("keys", [1, 17, 127, 256, 257, 600])
@pytest.mark.parametrize(("rows", "causal"), [(1, False), (3, True), (9, True), (50, False), (193, True)])
def test_ragged(rng, isa, *, rows, keys, causal):
    q, k, _ = qkv(rng, heads=2, kv_heads=1, rows=rows, keys=keys, dim=20)
    check(q, k, **EVERYTHING, segment_ids=segments(rng, keys), segment_count=6, options={"causal": causal})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, _ = qkv(rng, batch=2, rows=40, keys=70, dim=24, q_dtype=dtype, layout=layout)
    check(q, k, **EVERYTHING, segment_ids=segments(rng, 70), options={"causal": True})


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (8, 8), (7, 1), (16, 1)])
@pytest.mark.parametrize("rows", [1, 60])
def test_groups(rng, isa, heads, kv_heads, rows):
    q, k, _ = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=140, dim=16)
    weights = rng.standard_normal((2, heads, rows)).astype(np.float32)
    ids = np.stack([segments(rng, 140), segments(rng, 140)])
    check(q, k, **EVERYTHING, query_weights=weights, segment_ids=ids, options={"causal": True})
    repeated = np.repeat(k, heads // kv_heads, axis=1)
    one, other = (la.dense.prob_reduce(q, x, **EVERYTHING, causal=True) for x in (k, repeated))
    np.testing.assert_allclose(one.column_mass, other.column_mass, rtol=1e-5)
    np.testing.assert_allclose(one.entropy, other.entropy, rtol=1e-5)


@settings(max_examples=25 * len(_core.available_isas()))
@given(data=st.data(), isa=st.sampled_from(_core.available_isas()))
def test_any_options(data, isa):
    q, k, options, offset = data.draw(options_for())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    wanted = {name: value for name, value in EVERYTHING.items() if data.draw(st.booleans())}
    if "column_mass" in wanted and data.draw(st.booleans()):
        wanted["query_weights"] = rng.standard_normal(q.shape[2] if data.draw(st.booleans()) else q.shape[:3])
    if "distance_moments" in wanted and data.draw(st.booleans()):
        wanted["distance_limit"] = data.draw(st.integers(0, 300))
    if data.draw(st.booleans()) or not wanted:
        wanted["segment_ids"], wanted["segment_count"] = segments(rng, k.shape[2]), 5
    if data.draw(st.booleans()):
        lse = reference.prob_reduce(q, k, entropy=True, **options).lse
        shift = data.draw(st.floats(0.0, 3.0, width=16))
        wanted["lse"], offset = (lse + shift).astype(np.float32), offset + shift
    with running_on(isa):
        check(q, k, offset=offset, options=options, **wanted)


def test_rank_3(rng):
    q, k, _ = qkv(rng, rows=6, keys=40)
    whole = la.dense.prob_reduce(q, k, **EVERYTHING, query_weights=np.ones((1, 4, 6)), segment_ids=np.zeros(40, int))
    one = la.dense.prob_reduce(q[0], k[0], **EVERYTHING, query_weights=np.ones((4, 6)), segment_ids=np.zeros(40, int))
    for name in whole.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(whole, name)[0])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 60])
def test_keys_of_codes(rng, isa, dtype, rows):
    store = la.KVStore(2, 40, dtype=dtype, capacity=300)
    store.append(normal(rng, (2, 300, 40)), normal(rng, (2, 300, 40)))
    q = normal(rng, (4, rows, 40))
    decoded = np.asarray(store.keys)
    ours = la.dense.prob_reduce(q, store.keys, column_mass=True, entropy=True, causal=True)
    theirs = reference.prob_reduce(q, decoded, column_mass=True, entropy=True, causal=True)
    tolerance = tolerances.weights(q, decoded)
    tolerance.check_sums(ours.column_mass, theirs.column_mass, theirs.column_mass)
    tolerance.check_sums(ours.entropy, theirs.entropy, theirs.entropy + 1, factor_errors=2)


def test_column_mass_sums_to_the_number_of_rows(rng, isa):
    q, k, _ = qkv(rng, rows=300, keys=300)
    total = la.dense.prob_reduce(q, k, column_mass=True, causal=True).column_mass.sum(axis=-1, dtype=np.float64)
    tolerances.weights(q, k).check_sums(total, np.full_like(total, 300), np.full_like(total, 300))


def test_query_weights_of_one_row_pick_its_weights(rng, isa):
    q, k, _ = qkv(rng, rows=200, keys=300)
    picked = la.dense.prob_reduce(q, k, column_mass=True, query_weights=np.eye(200)[77], causal=True).column_mass
    weights = la.dense.attention_weights(q, k, [77], causal=True)[:, :, 0]
    tolerances.weights(q, k).check(picked, np.float64(weights))


def test_segments_of_one_key_are_the_weights(rng, isa):
    q, k, _ = qkv(rng, rows=20, keys=150)
    mass = la.dense.prob_reduce(q, k, segment_ids=np.arange(150), causal=True).segment_mass
    tolerances.weights(q, k).check(mass, np.float64(la.dense.attention_weights(q, k, range(20), causal=True)))


def test_one_segment_holds_everything_and_none_nothing(rng, isa):
    q, k, _ = qkv(rng, rows=20, keys=300)
    mass = la.dense.prob_reduce(q, k, segment_ids=np.zeros(300, np.uint8)).segment_mass
    tolerances.weights(q, k).check_sums(mass, np.ones_like(mass), np.ones_like(mass))
    empty = la.dense.prob_reduce(q, k, segment_ids=np.full(300, -1), segment_count=2).segment_mass
    assert empty.shape == (1, 4, 20, 2) and (empty == 0).all()


def test_equal_keys(isa):
    """Uniform causal attention: entropy ln(i + 1), mean distance i / 2, maximum 1 / (i + 1) at key 0."""
    q, k = np.zeros((1, 1, 300, 8), np.float32), np.ones((1, 1, 300, 8), np.float32)
    r = la.dense.prob_reduce(q, k, **EVERYTHING, causal=True)
    i = np.arange(300)
    np.testing.assert_allclose(r.entropy[0, 0], np.log(i + 1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(r.distance_moments[0, 0, :, 0], i / 2, rtol=1e-6)
    np.testing.assert_allclose(r.distance_moments[0, 0, :, 1], i * (2 * i + 1) / 6, rtol=1e-6)
    np.testing.assert_allclose(r.row_max[0, 0], 1 / (i + 1), rtol=1e-6)
    assert (r.row_max_key == 0).all()  # the lowest of equals
    np.testing.assert_allclose(r.column_max[0, 0], 1 / (i + 1), rtol=1e-6)


def test_a_limit_of_nought_hides_all_distances(rng, isa):
    q, k, _ = qkv(rng, rows=20, keys=300)
    near = la.dense.prob_reduce(q, k, distance_moments=2, distance_limit=0).distance_moments
    assert (near == 0).all()
    far, whole = (la.dense.prob_reduce(q, k, distance_moments=2, distance_limit=n) for n in (300, None))
    np.testing.assert_array_equal(far.distance_moments, whole.distance_moments)


def test_banded_columns_by_two_windows(rng, isa):
    """With the full lse, sums over a band of later rows are differences between windows."""
    q, k, v = qkv(rng, rows=200, keys=200)
    lse = la.attention(q, k, v, causal=True, return_lse=True)[1]
    wide, narrow = (
        la.dense.prob_reduce(q, k, column_mass=True, causal=True, window=(w, -1), lse=lse).column_mass for w in (50, 9)
    )
    p = reference.attention_weights(q, k, range(200), causal=True)
    d = np.arange(200)[:, None] - np.arange(200)
    expected = np.where((d >= 10) & (d <= 50), p, 0.0).sum(axis=-2)
    size = np.where((d >= 0) & (d <= 50), p, 0.0).sum(axis=-2) * 2
    tolerances.weights(q, k).check_sums(np.float64(wide) - narrow, expected, size)


def test_a_given_lse_saves_a_pass_and_changes_nothing(rng, isa):
    q, k, v = qkv(rng, rows=100, keys=300)
    sinks = normal(rng, (4,))
    lse = la.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)[1]
    check(q, k, **EVERYTHING, lse=lse, options={"causal": True, "sinks": sinks}, offset=5.0)
    computed = la.dense.prob_reduce(q, k, entropy=True, causal=True, sinks=sinks).lse
    np.testing.assert_allclose(computed, lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 30])
def test_rows_that_see_nothing(rng, isa, rows):
    q, k, _ = qkv(rng, rows=rows, keys=40)
    mask = np.ones((rows, 40), bool)
    mask[1] = False
    r = check(q, k, **EVERYTHING, segment_ids=segments(rng, 40), options={"mask": mask})
    assert (r.lse[:, :, 1] == -np.inf).all() and (r.row_max_key[:, :, 1] == -1).all()
    for sums in (r.entropy[:, :, 1], r.segment_mass[:, :, 1], r.distance_moments[:, :, 1], r.row_max[:, :, 1]):
        assert (sums == 0).all()


def test_no_rows_and_no_keys(rng):
    q, k, _ = qkv(rng, rows=5, keys=0)
    r = la.dense.prob_reduce(q, k, **EVERYTHING, segment_ids=np.zeros(0, int), segment_count=3)
    assert r.column_mass.shape == (1, 4, 0) and (r.segment_mass == np.zeros((1, 4, 5, 3))).all()
    assert (r.row_max_key == -1).all() and (r.lse == -np.inf).all()
    q, k, _ = qkv(rng, rows=0, keys=5)
    r = la.dense.prob_reduce(q, k, **EVERYTHING)
    assert (r.column_mass == np.zeros((1, 4, 5))).all() and r.entropy.shape == (1, 4, 0)


@pytest.mark.parametrize("rows", [3, 30])
def test_hidden_numbers_do_not_leak(rng, isa, rows):
    q, k, _ = qkv(rng, rows=rows, keys=300)
    seen = rng.random(300) > 0.3
    ids = segments(rng, 300)
    clean = la.dense.prob_reduce(q, k, **EVERYTHING, segment_ids=ids, mask=seen)
    k[:, :, ~seen] = np.nan
    poisoned = la.dense.prob_reduce(q, k, **EVERYTHING, segment_ids=ids, mask=seen)
    for name in clean.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(poisoned, name), getattr(clean, name))


@pytest.mark.parametrize("rows", [3, 30])
def test_visible_nan_shows(rng, isa, rows):
    q, k, _ = qkv(rng, heads=2, kv_heads=2, rows=rows, keys=300)
    k[0, 0, 299, 3] = np.nan  # the last row alone sees it
    mask = np.ones(300, bool)
    mask[17] = False
    r = la.dense.prob_reduce(q, k, **EVERYTHING, segment_ids=np.zeros(300, int), causal=True, mask=mask)
    for sums in (r.lse, r.entropy, r.row_max, r.segment_mass[..., 0], r.distance_moments[..., 0]):
        assert np.isnan(sums[0, 0, -1]) and np.isfinite(sums[0, 0, :-1]).all() and np.isfinite(sums[0, 1]).all()
    assert r.row_max_key[0, 0, -1] == 0
    for columns in (r.column_mass, r.column_max):
        assert np.isnan(columns[0, 0, mask]).all() and columns[0, 0, 17] == 0 and np.isfinite(columns[0, 1]).all()


def test_columns_of_100000_rows(rng):
    """A column's error does not grow with the rows: roundings of either sign cancel, equal ones add up over 8 rows."""
    rows = 100_000
    q = rng.standard_normal((1, 1, rows, 4)).astype(np.float32)
    k = rng.standard_normal((1, 1, 3, 4)).astype(np.float32)
    mass = la.dense.prob_reduce(q, k, column_mass=True).column_mass
    expected = reference.prob_reduce(q, k, column_mass=True).column_mass
    np.testing.assert_allclose(mass, expected, rtol=4 * tolerances.U)
    # Weights of 1/3 are rounded once; then 8 of them, one after the other, and the result.
    uniform = la.dense.prob_reduce(np.zeros_like(q), k, column_mass=True).column_mass
    np.testing.assert_allclose(uniform, rows / 3, rtol=(2 + 7 + 1) * tolerances.U)


PEAK = """
import resource, sys
import numpy as np
import longattn as la
x = np.random.default_rng(0).standard_normal((1, 16384, 8)).astype(np.float32)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
la.attention(x[:, :300], x, x)
before = peak()
la.dense.prob_reduce(x, x, column_mass=True, entropy=True, row_max=True, causal=True)
la.dense.selective_attention(x, x, x)
print(peak() - before)
"""


def test_memory_grows_with_the_length_only():
    """The weights would take 1 GiB; a strip of 192 rows takes 12 MiB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 64 << 20


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(1, 20_000), (450, 3_000)])
def test_the_same_bits_on_any_number_of_threads(rng, dtype, rows, keys):
    q, k, _ = qkv(rng, rows=rows, keys=keys, dim=32, q_dtype=dtype)
    weights = rng.standard_normal(rows)
    results = on_threads(
        lambda: la.dense.prob_reduce(
            q, k, **EVERYTHING, query_weights=weights, segment_ids=np.arange(keys) // 100, causal=True
        )
    )
    for other in results[1:]:
        for name in other.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(other, name), getattr(results[0], name))


Q, K = np.ones((2, 4, 3, 8), np.float32), np.ones((2, 2, 5, 8), np.float32)
BAD = [
    ({"entropy": False}, ValueError, "prob_reduce: got nothing to compute"),
    ({"q": Q.astype(np.float64)}, TypeError, "q: got dtype float64"),
    ({"k": K[:1]}, ValueError, "k: got batch 1, expected 2 as in q"),
    ({"entropy": 1}, TypeError, "entropy: got 1, expected True or False"),
    ({"column_mass": None}, TypeError, "column_mass: got None"),
    ({"column_max": "yes"}, TypeError, "column_max: got 'yes'"),
    ({"row_max": 0}, TypeError, "row_max: got 0"),
    ({"query_weights": np.ones(3)}, ValueError, "query_weights: got weights without column_mass=True"),
    ({"query_weights": np.ones(4), "column_mass": True}, ValueError, "query_weights: got shape (4,), expected (3,) or"),
    ({"query_weights": np.ones(3, int), "column_mass": True}, TypeError, "query_weights: got dtype int64"),
    ({"segment_ids": np.zeros(5)}, TypeError, "segment_ids: got dtype float64, expected integers"),
    ({"segment_ids": np.zeros(4, int)}, ValueError, "segment_ids: got shape (4,), expected (5,) or (2, 5)"),
    ({"segment_ids": np.full(5, 7), "segment_count": 7}, ValueError, "segment_ids: got 7, expected ids below 7"),
    ({"segment_ids": np.full(5, 2**40)}, ValueError, "segment_ids: got 1099511627776, expected ids below"),
    ({"segment_count": 3}, ValueError, "segment_count: got 3 without segment_ids"),
    ({"segment_count": -1, "segment_ids": np.zeros(5, int)}, ValueError, "segment_count: got -1, expected 0 to"),
    ({"distance_moments": 5}, ValueError, "distance_moments: got 5, expected 0 to 4"),
    ({"distance_moments": -1}, ValueError, "distance_moments: got -1"),
    ({"distance_moments": True}, TypeError, "distance_moments: got True, expected an integer"),
    ({"distance_moments": 1.0}, TypeError, "distance_moments: got 1.0"),
    ({"distance_limit": 3}, ValueError, "distance_limit: got 3 without distance_moments"),
    ({"distance_limit": -3, "distance_moments": 1}, ValueError, "distance_limit: got -3"),
    ({"lse": np.zeros((2, 4, 2), np.float32)}, ValueError, "lse: got shape (2, 4, 2), expected (2, 4, 3)"),
    ({"window": 3}, TypeError, "window: got 3"),
    ({"skip_threshold": 0.1}, TypeError, "skip_threshold: got an option that does not exist here, expected some of"),
    ({"state": (Q, Q[..., 0])}, TypeError, "state: got an option that does not exist here"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_refuses(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        la.dense.prob_reduce(**({"q": Q, "k": K, "entropy": True} | change))
