"""Product codes against their oracle, and what every index must do."""

import numpy as np
import pytest

import index_checks
import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from longattn.vectors import synthetic
from random_arrays import BF16, DTYPES, normal
from random_stores import queries, rows, store, store_of
from saved_codes import product_codes

#: (query heads, KV heads, rows, head_dim, value_dim, subvectors, bits)
SHAPES = [
    (4, 2, 1003, 32, 32, 4, 4),
    (5, 1, 700, 33, 1, 3, 4),
    (18, 1, 600, 20, 20, 20, 4),
    (8, 1, 2100, 64, 16, 8, 4),
    (1, 1, 580, 128, 40, 128, 4),
    (4, 2, 1003, 32, 32, 4, 8),
    (3, 1, 700, 33, 1, 11, 8),
    (18, 1, 600, 20, 20, 1, 8),
]


def check_logits(picked, oracle_rows, codes, q, among, scale):
    """The rows picked are the oracle's but for ties: what entries of the tables that round either way may change."""
    scores = reference.product_logits(q * scale, codes)
    mean = np.exp(scores - scores.max(-1, keepdims=True)).mean(0)
    least = np.sort(mean[among])[-len(picked)]
    assert (mean[picked] >= least * 0.98).all()
    assert len(np.setdiff1d(picked, oracle_rows)) <= 1 + len(picked) // 20


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(rng, isa, shape, tmp_path):
    heads, kv_heads, count, dim, value_dim, subvectors, bits = shape
    s = store(rng, kv_heads, count, dim, value_dim)
    index = la.index.ProductQuantisation(s, subvectors, bits)
    index.update()
    assert len(index) == count // 64 * 64
    codes = product_codes(index, tmp_path / "index")
    for h, of in enumerate(codes):
        # Each subvector has the nearest centroid; of two that are as near, either.
        x = s.keys[h, : len(index)] - of.centre
        wanted = reference.nearest(s.keys[h, : len(index)], of)
        for a, b, j in zip(of.codes.T, wanted.T, range(subvectors), strict=True):
            parts = x.reshape(len(x), subvectors, -1)[:, j]
            near, best = (((parts - of.codebooks[j][c]) ** 2).sum(-1) for c in (a, b))
            np.testing.assert_allclose(near, best, atol=1e-4)
    q = queries(rng, heads, 2, dim=dim)
    for sinks, window, top_k in [(4, 100, 40), (0, 0, 1), (3, 17, 133)]:
        call = {"sinks": sinks, "window": window, "top_k": top_k}
        result = la.retrieval_attention(q, s, index, rest="none", return_selected=True, **call)
        selected = result.stats.selected
        exact = reference.attention(q, s.keys, s.values, selected, len(index), sinks=sinks, window=window)
        tolerances.attention(q, s.keys, s.values).check(result.out, exact.out, result.lse, exact.lse)
        oracle = reference.product_attention(q, s.keys, s.values, codes, rest=False, **call)
        group = heads // kv_heads
        for h in range(kv_heads):
            for i in range(2):
                among = reference.candidates(count - 1 + i, len(index), sinks, window)
                own = q[h * group : (h + 1) * group, i].astype(np.float64)
                if group == 1:
                    check_logits(selected[h][i], oracle.selected[h][i], codes[h], own, among, dim**-0.5)
                assert len(selected[h][i]) == min(top_k, len(among))
                common = np.intersect1d(selected[h][i], oracle.selected[h][i])
                assert len(common) >= len(selected[h][i]) - 1 - top_k // 20
        whole = la.retrieval_attention(q, s, index, return_selected=True, **call)
        oracle = reference.product_attention(q, s.keys, s.values, codes, selected=whole.stats.selected, **call)
        # Entries of a table round to either side where they are halfway: a step of each query's widest table.
        step = 0.0 if bits == 8 else 0.05
        np.testing.assert_allclose(whole.lse, oracle.lse, atol=1e-4 + step)
        np.testing.assert_allclose(whole.out, oracle.out, atol=(1e-4 + 2 * step) * np.abs(s.values).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_every_isa_scores_the_same(bits):
    """Sums are exact, so rows are picked alike."""
    from longattn import _core

    rng = np.random.default_rng(3)
    s = store(rng, 1, 1500, 48)
    q = queries(rng, 7, dim=48)
    before, found = _core.isa(), []
    index = la.index.ProductQuantisation(s, bits=bits)
    index.update()
    try:
        for isa in _core.available_isas():
            _core.set_isa(isa)
            result = la.retrieval_attention(q, s, index, top_k=100, window=60, return_selected=True)
            found.append(result.stats.selected[0][0])
    finally:
        _core.set_isa(before)
    for other in found[1:]:
        assert len(np.intersect1d(found[0], other)) >= 98


def products(rng, count, dim, subvectors, centroids):
    """Keys all of whose subvectors are one of a few."""
    width = dim // subvectors
    books = normal(rng, (subvectors, centroids, width), spread=2.0)
    codes = rng.integers(0, centroids, (count, subvectors))
    return np.concatenate([books[j, codes[:, j]] for j in range(subvectors)], axis=1)[None]


def test_keys_that_are_products_of_centroids_are_exact(rng, isa):
    """With fewer kinds of subvectors than centroids nothing is lost: scores are logits, and the picks the top-k."""
    keys = products(rng, 1500, 24, 4, 6)
    s = store_of(keys, rows(rng, 1, 1500)[1])
    index = la.index.ProductQuantisation(s, 4, 8)
    q = queries(rng, 1, dim=24)
    result = la.retrieval_attention(q, s, index, top_k=50, window=60, return_selected=True)
    logits = keys[0, 4 : len(index) - 24] @ q[0, 0]
    worst = np.sort(logits[: 1440 - 4])[-50]
    assert (keys[0, result.stats.selected[0][0]] @ q[0, 0] >= worst - 1e-3).all()
    # And the mass of the others is their true mass.
    lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)[1]
    np.testing.assert_allclose(result.lse, lse, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_budget_of_all_rows_is_dense_attention(rng, isa, bits):
    s = store(rng, 2, 1403, 40, 24, dtype=BF16)
    index = la.index.ProductQuantisation(s, 5, bits)
    q = queries(rng, 6, 3, dim=40)
    for call in ({"top_k": 5000}, {"top_k": 1, "window": 5000}, {"top_k": 1403, "sinks": 0, "window": 0}):
        result = la.retrieval_attention(q, s, index, **call)
        out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)
        assert result.stats.fraction_attended == 1 and (result.stats.missed_mass == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    s = store(rng, 2, 900, 48, 16, dtype=dtype)
    index = la.index.ProductQuantisation(s)
    q = queries(rng, 4, 2, dim=48, dtype=dtype)
    result = la.retrieval_attention(q, s, index, top_k=100, window=60, rest="none", return_selected=True)
    exact = reference.attention(q, s.keys, s.values, result.stats.selected, len(index), window=60)
    tolerances.attention(q, s.keys, s.values).check(result.out, exact.out, result.lse, exact.lse)


def test_the_estimate_of_the_rest_is_not_too_small(rng):
    """Centroids are means: their weights alone fall short by half the variance of the logits inside a cell."""
    s = store(rng, 1, 8192, 64)
    q = queries(rng, 16, dim=64, spread=1.5)
    exact = la.attention(q, s.keys, s.values, causal=True, return_lse=True)[1]
    result = la.retrieval_attention(q, s, la.index.ProductQuantisation(s), top_k=64, window=64)
    none = la.retrieval_attention(q, s, la.index.ProductQuantisation(s), top_k=64, window=64, rest="none")
    assert abs((result.lse - exact).mean()) < 0.15 and (none.lse - exact).mean() < -0.5
    assert (result.stats.missed_mass_bound == 1).all()


def test_query_weighted_codes_rank_better(rng):
    keys, values, q, prefill = synthetic.head("synthetic", 0, 8192 + 512, 8, 3)
    s = store_of(keys[None].astype(BF16), values[None].astype(BF16), BF16)
    own = np.ascontiguousarray(prefill.transpose(1, 0, 2)).astype(np.float32)
    missed = {}
    for name, given in (("plain", None), ("weighted", own)):
        index = la.index.ProductQuantisation(s, queries=given)
        found = []
        for group in q:
            q4 = group[:, None].astype(np.float32)
            result = la.retrieval_attention(q4, s, index, top_k=256, rest="none", return_selected=True)
            exact = reference.attention(q4, s.keys, s.values, result.stats.selected, len(index))
            found.append(exact.missed_mass.mean())
        missed[name] = np.mean(found)
        assert index.parameters["query_weighted"] == (given is not None)
    assert missed["weighted"] < missed["plain"] < 0.6


def test_query_weighted_codes_against_the_oracle(rng, isa, tmp_path):
    s = store(rng, 2, 900, 32)
    index = la.index.ProductQuantisation(s, 4, 8, queries=queries(rng, 4, 100))
    index.update()
    codes = product_codes(index, tmp_path / "index")
    q = queries(rng, 4)
    for h, of in enumerate(codes):
        x, y = of.key_basis @ s.keys[h].T.astype(np.float64), of.query_basis @ q[2 * h, 0]
        np.testing.assert_allclose(y @ x, s.keys[h] @ q[2 * h, 0], atol=1e-3)
    result = la.retrieval_attention(q, s, index, top_k=60, window=40, return_selected=True)
    oracle = reference.product_attention(
        q, s.keys, s.values, codes, top_k=60, window=40, selected=result.stats.selected
    )
    np.testing.assert_allclose(result.lse, oracle.lse, atol=1e-3)
    np.testing.assert_allclose(result.out, oracle.out, atol=1e-2)


def test_a_basis_of_few_rows_and_queries_is_one(rng):
    """It keeps inner products, however little it was fitted to."""
    for count, n in ((1, 1), (5, 2)):
        s = store(rng, 2, count)
        index = la.index.ProductQuantisation(s, queries=queries(rng, 4, n))
        s.append(*rows(rng, 2, 1000))
        q = queries(rng, 4)
        result = la.retrieval_attention(q, s, index, top_k=5000)
        out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)


@pytest.mark.parametrize("bits", [4, 8])
def test_constant_and_duplicate_keys(rng, isa, bits):
    _, values = rows(rng, 1, 1100)
    s = store_of(np.full((1, 1100, 32), 0.75, np.float32), values)
    index = la.index.ProductQuantisation(s, bits=bits)
    result = la.retrieval_attention(queries(rng, 2), s, index, top_k=21, window=80, return_selected=True)
    np.testing.assert_array_equal(result.stats.selected[0][0], np.arange(4, 25))
    lse = la.attention(q := queries(rng, 2), s.keys, s.values, causal=True, return_lse=True)[1]
    np.testing.assert_allclose(la.retrieval_attention(q, s, index, top_k=21, window=80).lse, lse, atol=1e-4)
    keys, values = rows(rng, 1, 40)
    s = store_of(np.tile(keys, (1, 32, 1)), np.tile(values, (1, 32, 1)))
    index = la.index.ProductQuantisation(s, bits=bits)
    result = la.retrieval_attention(queries(rng, 1), s, index, top_k=74, sinks=0, window=0, return_selected=True)
    kinds, counts = np.unique(result.stats.selected[0][0] % 40, return_counts=True)
    assert sorted(counts)[-2:] == [32, 32] or bits == 4  # 16 centroids may not tell two kinds apart
    assert len(kinds) >= 3


def make(s, **options):
    return la.index.ProductQuantisation(s, **{"subvectors": 6, **options})


@pytest.mark.parametrize("bits", [4, 8])
def test_fork_and_files(bits, tmp_path):
    # Codes depend on the rows of the fit; a fork that was not fitted anew has those of the original.
    rng = np.random.default_rng(12)
    s = store_of(*rows(rng, 2, 1800, 24, 20))
    index = make(s, bits=bits)
    index.update()
    fork = s.fork()
    copy = index.fork(fork)
    index_checks.check_same(index_checks.answer(copy, fork), index_checks.answer(index, s))
    fork.truncate(1500)
    fork.append(*rows(rng, 2, 400, 24, 20))
    result = index_checks.answer(copy, fork)
    assert len(copy) == 1856 and all(np.isfinite(x).all() for x in result)
    index_checks.check_files(lambda s: make(s, bits=bits), tmp_path)


def test_growth_and_truncates(rng):
    """Whatever came and went, the rows read are right, and codes are those of the rows that are there."""
    keys, values = rows(rng, 2, 6000, 24, 20)
    other_keys, other_values = rows(rng, 2, 6000, 24, 20)
    s = store_of(keys[:, :100], values[:, :100])
    index = make(s)
    q = queries(rng, 4, dim=24)
    held = 100
    for keep, to in [
        (100, 511),
        (511, 600),
        (600, 601),
        (601, 3000),
        (2990, 3100),
        (2500, 5000),
        (900, 950),
        (10, 700),
    ]:
        if keep < held:
            s.truncate(keep)
            keys[:, keep:], values[:, keep:] = other_keys[:, keep:], other_values[:, keep:]
        s.append(keys[:, keep:to], values[:, keep:to])
        held = to
        result = la.retrieval_attention(q, s, index, top_k=70, window=50, rest="none", return_selected=True)
        exact = reference.attention(q, s.keys, s.values, result.stats.selected, len(index), window=50)
        tolerances.attention(q, s.keys, s.values).check(result.out, exact.out, result.lse, exact.lse)
        np.testing.assert_array_equal(s.keys, keys[:, :held])
        assert len(index) == (held // 64 * 64 if held >= 512 else 0)
        if held >= 512:
            # Ranks of stale codes would be no better than chance.
            logits = np.einsum("hgd,hnd->hgn", q[:, 0].reshape(2, 2, 24), s.keys[:, 4 : len(index)])
            for h in range(2):
                chosen = result.stats.selected[h][0] - 4
                assert logits[h][:, chosen].mean() > logits[h].mean() + 0.5 * logits[h].std()


@pytest.mark.parametrize("bits", [4, 8])
def test_odd_numbers(bits):
    index_checks.check_keys_that_are_not_finite(lambda s: make(s, bits=bits))
    index_checks.check_values_that_are_not_finite(lambda s: make(s, bits=bits))


def test_threads():
    index_checks.check_threads_and_callers(make)


def test_statistics(rng):
    s = store(rng, 2, 1000, 32, 20, dtype=BF16)
    index = la.index.ProductQuantisation(s)
    assert (index.subvectors, index.bits) == (4, 4)
    stats = la.retrieval_attention(queries(rng, 4), s, index, top_k=50, window=100).stats
    assert (stats.keys_scored == 896).all() and (stats.keys_attended == 104 + 50).all()
    assert (stats.index_bytes == 15 * 64 * (2 + 1)).all()  # blocks 0 to 14: codes, and a byte of the value's cluster
    assert len(index) == 960
    assert la.index.ProductQuantisation(la.KVStore(1, 7, 7, capacity=10)).subvectors == 1


def test_a_store_shorter_than_sinks_and_window(rng):
    s = store(rng, 2, 600)
    q = queries(rng, 4)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    for call in ({"sinks": 300, "window": 300}, {"sinks": 4, "window": 600}, {"sinks": 1000, "window": 0}):
        result = la.retrieval_attention(q, s, la.index.ProductQuantisation(s), top_k=1, **call)
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)


def test_bad_arguments(rng):
    s = store(rng)
    q = queries(rng, 4, 100)
    for options, message in [
        ({"subvectors": 5}, "subvectors: got 5, expected a divisor of the head_dim, 32"),
        ({"subvectors": 0}, "subvectors: got 0"),
        ({"bits": 6}, "bits: got 6, expected 4 or 8"),
        ({"seed": -1}, "seed: got -1"),
        ({"queries": q[:3]}, "queries: got shape"),
        ({"queries": q[:, :0]}, "queries: got none"),
        ({"queries": np.full_like(q, np.nan)}, "queries: got NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            la.index.ProductQuantisation(s, **options)
    with pytest.raises(TypeError, match="queries: got dtype int64"):
        la.index.ProductQuantisation(s, queries=np.zeros((4, 100, 32), np.int64))
    with pytest.raises(ValueError, match="store: got an empty store"):
        la.index.ProductQuantisation(la.KVStore(2, 32, 32, capacity=10), queries=q)
    wide = la.KVStore(1, 256, 256, capacity=10)
    with pytest.raises(ValueError, match="subvectors: got 256, expected at most 128 with 4 bits"):
        la.index.ProductQuantisation(wide, 256)
