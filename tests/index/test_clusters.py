"""Clusters of keys against their oracle, and what every index must do."""

import numpy as np
import pytest

import index_checks
import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from longattn.vectors import synthetic
from random_arrays import BF16, DTYPES, F32
from random_stores import queries, rows, store, store_of

SCORES = ("mean", "mean_variance", "bounds", "radius")
ESTIMATING = ("mean", "mean_variance")


def small(s, **options):
    """Clusters of few rows, so that small stores have many segments."""
    return la.index.Clusters(s, **{"segment": 512, "keys_per_cluster": 16, "tail": 128, **options})


def oracle(q, s, index, **call):
    members = [index.members(h) for h in range(s.kv_heads)]
    call.setdefault("rest", index.estimates)
    call["score"] = index.score
    return reference.unit_attention(q, s.keys, s.values, members, **call)


def check(q, s, index, result, expected):
    for picked, wanted in zip(result.stats.selected, expected.selected, strict=True):
        for a, b in zip(picked, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
    tolerances.attention(q, s.keys, s.values).check(result.out, expected.out, result.lse, expected.lse)
    if index.estimates:
        np.testing.assert_allclose(result.stats.missed_mass, expected.missed_mass, atol=1e-5)


#: (query heads, KV heads, rows, head_dim, value_dim)
SHAPES = [(4, 2, 1003, 32, 32), (5, 1, 1700, 33, 1), (2, 2, 530, 1, 7), (18, 1, 600, 20, 20), (8, 1, 2100, 64, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_oracle(rng, isa, shape, score):
    heads, kv_heads, count, dim, value_dim = shape
    s = store(rng, kv_heads, count, dim, value_dim)
    index = small(s, score=score)
    q = queries(rng, heads, 2, dim=dim)
    for sinks, window, top_k in [(4, 100, 40), (0, 0, 1), (3, 17, 333)]:
        call = {"sinks": sinks, "window": window, "top_k": top_k}
        result = la.retrieval_attention(q, s, index, return_selected=True, **call)
        check(q, s, index, result, oracle(q, s, index, **call))
    assert len(index) == count // 128 * 128


@pytest.mark.parametrize("score", ESTIMATING)
@pytest.mark.parametrize("p", [0.3, 0.8, 0.999])
def test_budget_of_mass(rng, isa, score, p):
    s = store(rng, 2, 1500, 32)
    index = small(s, score=score)
    q = queries(rng, 4)
    result = la.retrieval_attention(q, s, index, top_p=p, window=64, return_selected=True)
    expected = oracle(q, s, index, top_p=p, window=64)
    check(q, s, index, result, expected)
    assert (expected.missed_mass <= 1 - p + 1e-9).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ESTIMATING)
def test_dtypes(rng, isa, dtype, score):
    s = store(rng, 2, 1200, 48, 16, dtype=dtype)
    index = small(s, score=score)
    q = queries(rng, 4, 2, dim=48, dtype=dtype)
    result = la.retrieval_attention(q, s, index, top_k=100, window=60, return_selected=True)
    expected = oracle(q, s, index, top_k=100, window=60, selected=result.stats.selected)
    index_checks.check_rounded(result, expected, q, s)


@pytest.mark.parametrize(
    "options", [{}, {"spherical": True}, {"keys_per_cluster": 1}, {"keys_per_cluster": 512}], ids=str
)
def test_every_row_is_in_one_cluster_of_its_segment(rng, isa, options):
    s = store(rng, 2, 1501, 24)
    index = small(s, **options)
    index.update()
    parts = [0, 512, 1024, 1152, 1280, 1408]
    for h in range(2):
        members = index.members(h)
        np.testing.assert_array_equal(np.sort(np.concatenate(members)), np.arange(1408))
        for cluster in members:
            assert (np.diff(cluster.astype(np.int64)) > 0).all()
            assert np.searchsorted(parts, cluster[0], "right") == np.searchsorted(parts, cluster[-1], "right")
    if "keys_per_cluster" not in options:
        assert 60 < len(index.members(0)) <= 88


@pytest.mark.parametrize("score", ESTIMATING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 40), (128, 128), (17, 3)])
def test_tables_of_bytes(rng, isa, score, dtype, dim, value_dim):
    """Half the bytes, the same clusters; scores and means are off by the rounding to bytes."""
    s = store(rng, 2, 1500, dim, value_dim, dtype=dtype)
    index, exact = small(s, score=score, tables="int8"), small(s, score=score)
    q = queries(rng, 4, 2, dim=dim, dtype=dtype, spread=0.5)
    results = [la.retrieval_attention(q, s, i, top_k=150, window=60, return_selected=True) for i in (index, exact)]
    for h in range(2):
        for rows_of_codes, rows_of_numbers in zip(index.members(h), exact.members(h), strict=True):
            np.testing.assert_array_equal(rows_of_codes, rows_of_numbers)
        for one, other in zip(*(r.stats.selected[h] for r in results), strict=True):
            assert len(np.intersect1d(one, other)) >= 0.7 * len(one)
    if dim >= 64:  # a byte a number, a scale and an offset for 32 or 64, against 2 or 4 bytes
        per_unit = [result.stats.index_bytes.sum() / result.stats.keys_scored.sum() for result in results]
        assert per_unit[0] < 0.72 * per_unit[1]
        assert index.nbytes < exact.nbytes
    out, wanted = (np.asarray(r.out, np.float32) for r in results)
    assert np.linalg.norm(out - wanted) < 0.1 * np.linalg.norm(wanted)
    np.testing.assert_allclose(results[0].lse, results[1].lse, atol=0.1)


def test_tables_of_bytes_are_indexes(tmp_path):
    def make(s):
        return small(s, score="mean_variance", tables="int8")

    index_checks.check_follows(make, dtype=BF16)
    index_checks.check_fork(make)
    index_checks.check_files(make, tmp_path, dtype=BF16)
    index_checks.check_keys_that_are_not_finite(make)
    index_checks.check_threads_and_callers(make)


def test_tables_of_bytes_are_no_bounds(rng):
    s = store(rng)
    for score in ("bounds", "radius"):
        with pytest.raises(ValueError, match=f"tables: got int8 with the score {score}"):
            small(s, score=score, tables="int8")


def test_separated_groups_are_found(rng, isa):
    centres = 10 * np.eye(32, dtype=np.float32)
    kinds = rng.integers(0, 32, 1024)
    keys = centres[kinds] + 0.1 * rng.normal(size=(1024, 32)).astype(np.float32)
    s = store_of(keys[None], rows(rng, 1, 1024)[1])
    # Drawn centroids miss some groups and split others; still most clusters are of one kind.
    index = la.index.Clusters(s, segment=1024, keys_per_cluster=8)
    index.update()
    pure = [len(np.unique(kinds[rows])) == 1 for rows in index.members(0)]
    assert np.mean(pure) > 0.9


@pytest.mark.parametrize("score", SCORES)
def test_a_budget_of_all_rows_is_dense_attention(rng, isa, score):
    s = store(rng, 2, 1403, 40, 24, dtype=BF16)
    index = small(s, score=score)
    q = queries(rng, 6, 3, dim=40)
    for call in ({"top_k": 5000}, {"top_k": 1, "window": 5000}, {"top_k": 1403, "sinks": 0, "window": 0}):
        result = la.retrieval_attention(q, s, index, **call)
        out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)
        assert result.stats.fraction_attended == 1


def test_as_many_clusters_as_rows_are_exact(rng, isa):
    s = store(rng, 2, 1300, 32)
    index = small(s, keys_per_cluster=1)
    q = queries(rng, 4)
    result = la.retrieval_attention(q, s, index, top_k=37, window=20, return_selected=True)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)
    single = store(rng, 1, 1300, 32)
    result = la.retrieval_attention(q[:1], single, small(single, keys_per_cluster=1), top_k=37, return_selected=True)
    logits = single.keys[0, 4:788] @ q[0, 0]
    best = np.sort(np.argsort(-logits, kind="stable")[:37]) + 4
    np.testing.assert_array_equal(result.stats.selected[0][0], best)


def test_clusters_of_equal_keys_make_the_estimate_exact(rng, isa):
    """Sinks and window cut some of them; one is read in part."""
    keys, _ = rows(rng, 2, 20, 32, offset=0)
    _, values = rows(rng, 2, 1100, 32)
    s = store_of(keys[:, np.arange(1100) % 20], values)
    q = queries(rng, 4, 2)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    for score in ESTIMATING:
        # As many clusters as rows: those of equal keys fall together.
        index = small(s, score=score, keys_per_cluster=1)
        result = la.retrieval_attention(q, s, index, top_k=70, sinks=3, window=133)
        assert all(len(index.members(h)) == 2 * 20 for h in range(2))
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)


@pytest.mark.parametrize("score", ["bounds", "radius"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_hold(rng, isa, score, dtype):
    s = store(rng, 2, 1500, 48, dtype=dtype)
    index = small(s, score=score)
    q = queries(rng, 8, 2, dim=48)
    for top_k in (16, 300, 1200):
        result = la.retrieval_attention(q, s, index, top_k=top_k, window=60, return_selected=True)
        exact = reference.attention(q, s.keys, s.values, result.stats.selected, len(index), window=60)
        assert (exact.missed_mass <= result.stats.missed_mass_bound + 1e-6).all()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_constant_keys(rng, isa, score, spherical):
    _, values = rows(rng, 1, 1100)
    s = store_of(np.full((1, 1100, 32), 0.75, np.float32), values)
    index = small(s, score=score, spherical=spherical)
    q = queries(rng, 2)
    result = la.retrieval_attention(q, s, index, top_k=21, window=20, return_selected=True)
    np.testing.assert_array_equal(result.stats.selected[0][0], np.arange(4, 25))
    assert len(index.members(0)) == 2
    if score in ESTIMATING:
        out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)


def test_they_find_what_pages_miss(rng):
    """On scattered content clusters hold far more of the mass than pages, at the same rows and bytes."""
    keys, values = rows(rng, 1, 8192 + 600, 64, spread=0.3)
    kinds = rng.integers(0, 64, keys.shape[1])
    keys += 2 * rng.normal(size=(64, 64)).astype(np.float32)[kinds]
    s = store_of(keys, values)
    q = 2 * keys[0, rng.integers(0, 8192, 4)][:, None]
    missed = {}
    for index in (la.index.Clusters(s), la.index.Pages(s, 64)):
        result = la.retrieval_attention(q, s, index, top_k=1024, rest="none", return_selected=True)
        exact = reference.attention(q, s.keys, s.values, result.stats.selected, len(index))
        missed[type(index)] = exact.missed_mass.mean()
    assert missed[la.index.Clusters] < 0.2 and missed[la.index.Pages] > 0.6


@pytest.mark.parametrize(("name", "gain"), [("synthetic", 0.95), ("synthetic-flat", 0.4)])
def test_synthetic_heads(name, gain):
    """Keys as models have them: beside a few per cent of the rows an estimate of the others helps."""
    keys, values, q, _ = synthetic.head(name, 0, 8192 + 512, 4, 3)
    s = store_of(keys[None].astype(BF16), values[None].astype(BF16), BF16)
    index = la.index.Clusters(s, keys_per_cluster=16, score="mean_variance")
    errors = {"values": [], "none": []}
    for group in q:
        q4 = group[:, None].astype(np.float32)
        exact = la.attention(q4, s.keys, s.values, causal=True)
        for rest, found in errors.items():
            result = la.retrieval_attention(q4, s, index, top_k=256, rest=rest)
            found.append(np.linalg.norm(result.out - exact, axis=-1) / np.linalg.norm(exact, axis=-1))
    assert np.mean(errors["values"]) < gain * np.mean(errors["none"]) < gain


def test_new_rows_get_clusters_of_their_own(rng):
    keys, values = rows(rng, 1, 1024, 32)
    s = store_of(keys, values)
    index = small(s)
    index.update()
    before = index.members(0)
    far, values = rows(rng, 1, 300, 32, offset=50.0)
    s.append(far, values)
    index.update()
    assert len(index) == 1280
    for old, new in zip(before, index.members(0), strict=False):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "options", [{}, {"keys_per_cluster": 1, "tail": 512}, {"tail": 64, "spherical": True}], ids=str
)
def test_follows_its_store(score, options):
    index_checks.check_follows(lambda s: small(s, score=score, **options), dtype=BF16)


@pytest.mark.parametrize("score", SCORES)
def test_fork_and_files(score, tmp_path):
    index_checks.check_fork(lambda s: small(s, score=score, seed=4))
    for dtype in DTYPES:
        index_checks.check_files(lambda s: small(s, score=score), tmp_path, dtype=dtype)


@pytest.mark.parametrize("score", SCORES)
def test_odd_numbers(score):
    index_checks.check_keys_that_are_not_finite(lambda s: small(s, score=score))
    index_checks.check_values_that_are_not_finite(lambda s: small(s, score=score))


def test_threads():
    index_checks.check_threads_and_callers(lambda s: small(s, keys_per_cluster=2))


def test_seeds(rng):
    s = store(rng, 1, 1200, dtype=F32)
    one, same, other = (small(s, seed=seed) for seed in (1, 1, 2))
    index_checks.check_same(index_checks.answer(one, s), index_checks.answer(same, s))
    assert [m.tolist() for m in one.members(0)] != [m.tolist() for m in (other.update(), other.members(0))[1]]


def test_a_store_shorter_than_sinks_and_window(rng):
    s = store(rng, 2, 140)
    q = queries(rng, 4)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    for call in ({"sinks": 130, "window": 20}, {"sinks": 4, "window": 512}, {"sinks": 500, "window": 0}):
        result = la.retrieval_attention(q, s, small(s), top_k=1, **call)
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)


def test_bad_arguments(rng):
    s = store(rng)
    for name, value, message in [
        ("segment", 0, "segment: got 0"),
        ("tail", 100, "tail: got 100, expected a divisor of the segment, 512"),
        ("keys_per_cluster", 0, "keys_per_cluster: got 0"),
        ("iterations", -1, "iterations: got -1"),
        ("score", "landmark", "score: got 'landmark'"),
        ("seed", -1, "seed: got -1"),
        ("tables", "int4", "tables: got 'int4'"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(s, **{name: value})
    with pytest.raises(TypeError, match="spherical: got 1"):
        small(s, spherical=1)
    with pytest.raises(ValueError, match="head: got 2"):
        small(s).members(2)
