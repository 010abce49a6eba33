"""Pages against their oracle, and what every index must do."""

import numpy as np
import pytest

import index_checks
import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from random_arrays import BF16, DTYPES, F32
from random_stores import queries, rows, store, store_of

SCORES = ("mean", "mean_variance", "bounds", "radius", "landmark")
ESTIMATING = ("mean", "mean_variance")


def oracle(q, s, index, *, landmark=-1, **call):
    pages = [reference.page_rows(len(index), index.page_size)] * s.kv_heads
    call.setdefault("rest", index.estimates)
    return reference.unit_attention(q, s.keys, s.values, pages, score=index.score, landmark=landmark, **call)


def check(q, s, index, result, expected):
    for picked, wanted in zip(result.stats.selected, expected.selected, strict=True):
        for a, b in zip(picked, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
    tolerances.attention(q, s.keys, s.values).check(result.out, expected.out, result.lse, expected.lse)
    if index.estimates:
        np.testing.assert_allclose(result.stats.missed_mass, expected.missed_mass, atol=1e-5)


#: (query heads, KV heads, rows, head_dim, value_dim, page_size)
SHAPES = [
    (4, 2, 1003, 32, 32, 16),
    (5, 1, 640, 33, 1, 7),
    (2, 2, 530, 1, 7, 64),
    (18, 1, 300, 20, 20, 3),
    (8, 1, 2600, 64, 16, 16),
    (1, 1, 90, 128, 40, 100),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_oracle(rng, isa, shape, score):
    heads, kv_heads, count, dim, value_dim, page_size = shape
    s = store(rng, kv_heads, count, dim, value_dim)
    index = la.index.Pages(s, page_size, score)
    q = queries(rng, heads, 2, dim=dim)
    for sinks, window, top_k in [(4, 100, 40), (0, 0, 1), (3, 17, 133)]:
        call = {"sinks": sinks, "window": window, "top_k": top_k}
        result = la.retrieval_attention(q, s, index, return_selected=True, **call)
        check(q, s, index, result, oracle(q, s, index, **call))
        assert len(index) == count // page_size * page_size


@pytest.mark.parametrize("score", ESTIMATING)
def test_without_the_rest(rng, isa, score):
    s = store(rng, 2, 1200, 40, 24)
    index = la.index.Pages(s, 16, score)
    q, sink_logits = queries(rng, 6, dim=40), np.linspace(-1, 3, 6).astype(np.float32)
    for rest in ("values", "none"):
        call = {"top_k": 90, "window": 30, "sink_logits": sink_logits}
        result = la.retrieval_attention(q, s, index, rest=rest, return_selected=True, **call)
        check(q, s, index, result, oracle(q, s, index, rest=rest == "values", **call))


@pytest.mark.parametrize("score", ESTIMATING)
@pytest.mark.parametrize("p", [0.3, 0.8, 0.999])
def test_budget_of_mass(rng, isa, score, p):
    s = store(rng, 2, 1500, 32)
    index = la.index.Pages(s, 16, score)
    q = queries(rng, 4)
    result = la.retrieval_attention(q, s, index, top_p=p, window=64, return_selected=True)
    expected = oracle(q, s, index, top_p=p, window=64)
    check(q, s, index, result, expected)
    assert (expected.missed_mass <= 1 - p + 1e-9).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_dtypes(rng, isa, dtype, score):
    s = store(rng, 2, 900, 48, 16, dtype=dtype)
    index = la.index.Pages(s, 8, score)
    q = queries(rng, 4, 2, dim=48, dtype=dtype)
    result = la.retrieval_attention(q, s, index, top_k=100, window=60, rest="none", return_selected=True)
    selected = result.stats.selected
    exact = reference.attention(q, s.keys, s.values, selected, len(index), window=60)
    tolerances.attention(q, s.keys, s.values).check(result.out, exact.out, result.lse, exact.lse)
    if dtype == F32 or score in ("bounds", "landmark"):  # kept without rounding
        expected = oracle(q, s, index, top_k=100, window=60, rest=False)
        for h in range(2):
            for i in range(2):
                np.testing.assert_array_equal(selected[h][i], expected.selected[h][i])
    if score in ESTIMATING:
        # Means are rounded to the store's dtype, and with them logits, by that part of the products of their numbers.
        whole = la.retrieval_attention(q, s, index, top_k=100, window=60, return_selected=True)
        expected = oracle(q, s, index, top_k=100, window=60, selected=whole.stats.selected)
        index_checks.check_rounded(whole, expected, q, s)


@pytest.mark.parametrize("score", SCORES)
def test_a_budget_of_all_rows_is_dense_attention(rng, isa, score):
    s = store(rng, 2, 1003, 40, 24, dtype=BF16)
    index = la.index.Pages(s, 16, score)
    q = queries(rng, 6, 3, dim=40)
    for call in ({"top_k": 5000}, {"top_k": 1, "window": 5000}, {"top_k": 1003, "sinks": 0, "window": 0}):
        result = la.retrieval_attention(q, s, index, **call)
        out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)
        assert result.stats.fraction_attended == 1
        assert (result.stats.missed_mass == 0).all() and (result.stats.missed_mass_bound == 0).all()


@pytest.mark.parametrize("score", ["mean", "landmark"])
def test_pages_of_one_row_are_exact_top_k(rng, isa, score):
    """And weighing each row by its own logit makes the whole dense attention, whatever is read."""
    s = store(rng, 1, 1300, 32)
    index = la.index.Pages(s, 1, score)
    q = queries(rng, 1)
    result = la.retrieval_attention(q, s, index, top_k=37, window=20, return_selected=True)
    logits = s.keys[0, 4:1280] @ q[0, 0]
    best = np.sort(np.argsort(-logits, kind="stable")[:37]) + 4
    np.testing.assert_array_equal(result.stats.selected[0][0], best)
    if score == "mean":
        out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)


@pytest.mark.parametrize("score", ["bounds", "radius"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_hold(rng, isa, score, dtype):
    """The score of a page is at least each of its logits, and so the missed mass is below what is stated."""
    s = store(rng, 2, 1500, 48, dtype=dtype)
    index = la.index.Pages(s, 16, score)
    q = queries(rng, 8, 2, dim=48)
    for top_k in (16, 300, 1200):
        result = la.retrieval_attention(q, s, index, top_k=top_k, window=60, return_selected=True)
        exact = reference.attention(q, s.keys, s.values, result.stats.selected, len(index), window=60)
        assert (exact.missed_mass <= result.stats.missed_mass_bound + 1e-6).all()
        np.testing.assert_array_equal(result.stats.missed_mass, result.stats.missed_mass_bound)
    keys = np.asarray(s.keys, np.float64)
    for page in reference.page_rows(len(index), 16):
        scores = reference.unit_scores(q[:4, 0], keys[0], page, page, score)
        assert (np.asarray(q[:4, 0], np.float64) @ keys[0, page].T <= scores[:, None] + 1e-9).all()


def test_equal_keys_in_each_page_make_the_estimate_exact(rng, isa):
    keys, values = rows(rng, 2, 64, 32)
    _, values = rows(rng, 2, 1024, 32)
    s = store_of(np.repeat(keys, 16, axis=1), values)
    q = queries(rng, 4)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    for score in ESTIMATING:
        result = la.retrieval_attention(q, s, la.index.Pages(s, 16, score), top_k=40, sinks=3, window=33)
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)


def test_variance_brings_the_mass_of_gaussian_pages_nearer(rng):
    s = store(rng, 1, 8192, 64)
    q = queries(rng, 16, dim=64, spread=1.0)
    exact = la.attention(q, s.keys, s.values, causal=True, return_lse=True)[1]
    error = {}
    for score in ESTIMATING:
        result = la.retrieval_attention(q, s, la.index.Pages(s, 16, score), top_k=64, window=64)
        error[score] = np.abs(result.lse - exact).mean()
    assert error["mean_variance"] < 0.7 * error["mean"]


@pytest.mark.parametrize("score", SCORES)
def test_constant_keys_tie_to_the_lowest_rows(rng, isa, score):
    _, values = rows(rng, 1, 900)
    s = store_of(np.full((1, 900, 32), 0.75, np.float32), values)
    index = la.index.Pages(s, 16, score)
    result = la.retrieval_attention(queries(rng, 2), s, index, top_k=21, window=20, return_selected=True)
    np.testing.assert_array_equal(result.stats.selected[0][0], np.arange(4, 25))


def test_statistics(rng):
    s = store(rng, 2, 1000, 32, 20, dtype=BF16)
    index = la.index.Pages(s, 16)
    q = queries(rng, 4)
    result = la.retrieval_attention(q, s, index, top_k=50, window=100)
    stats = result.stats
    assert (stats.keys_scored == 57).all()  # rows 4 to 899 touch pages 0 to 56
    assert (stats.index_bytes == 57 * 2 * (32 + 32)).all() and (stats.keys_attended == 104 + 50).all()
    assert (la.retrieval_attention(q, s, index, top_k=50, window=100, rest="none").stats.index_bytes == 57 * 64).all()
    assert index.nbytes == 2 * 62 * 2 * (32 + 32) and len(index) == 992
    assert repr(index) == f"Pages(page_size=16, score='mean', rows=992, nbytes={index.nbytes})"


def test_huge_keys(rng, isa):
    keys, values = rows(rng, 1, 1500, 64, spread=1e3, offset=0)
    for dtype in DTYPES:
        s = store_of(keys, values, dtype)
        for score in SCORES:
            result = la.retrieval_attention(queries(rng, 3, dim=64), s, la.index.Pages(s, 16, score), top_k=200)
            assert np.isfinite(result.out).all() and np.isfinite(result.lse).all()


def test_queries_that_are_not_finite(rng, isa):
    s = store(rng)
    index = la.index.Pages(s)
    q = queries(rng, 4, 2)
    good = la.retrieval_attention(q, s, index, top_k=9)
    q[0, 1, 3] = np.nan
    result = la.retrieval_attention(q, s, index, top_k=9)
    assert np.isnan(result.out[0, 1]).all()
    np.testing.assert_array_equal(result.out[:, 0], good.out[:, 0])
    np.testing.assert_array_equal(result.out[2:], good.out[2:])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_follows_its_store(score, page_size):
    index_checks.check_follows(lambda s: la.index.Pages(s, page_size, score), dtype=BF16)


@pytest.mark.parametrize("score", SCORES)
def test_fork_and_files(score, tmp_path):
    index_checks.check_fork(lambda s: la.index.Pages(s, 16, score))
    for dtype in DTYPES:
        index_checks.check_files(lambda s: la.index.Pages(s, 16, score, landmark=3), tmp_path, dtype=dtype)


@pytest.mark.parametrize("score", SCORES)
def test_odd_numbers(score):
    index_checks.check_keys_that_are_not_finite(lambda s: la.index.Pages(s, 16, score))
    index_checks.check_values_that_are_not_finite(lambda s: la.index.Pages(s, 16, score))


def test_threads():
    index_checks.check_threads_and_callers(lambda s: la.index.Pages(s, 1))


def test_a_store_shorter_than_sinks_and_window(rng):
    s = store(rng, 2, 40)
    index = la.index.Pages(s, 8)
    q = queries(rng, 4)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    for call in ({"sinks": 30, "window": 20}, {"sinks": 4, "window": 512}, {"sinks": 100, "window": 0}):
        result = la.retrieval_attention(q, s, index, top_k=1, **call)
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)


def test_bad_arguments(rng):
    s = store(rng)
    with pytest.raises(TypeError, match="store: got str, expected a KVStore"):
        la.index.Pages("store")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"page_size: got 0"):
        la.index.Pages(s, 0)
    with pytest.raises(TypeError, match=r"page_size: got 2.5"):
        la.index.Pages(s, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="score: got 'max'"):
        la.index.Pages(s, 16, "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="landmark: got 16"):
        la.index.Pages(s, 16, "landmark", landmark=16)
    bounds = la.index.Pages(s, 16, "bounds")
    with pytest.raises(ValueError, match="rest: got values"):
        la.retrieval_attention(queries(rng), s, bounds, top_k=5, rest="values")
    with pytest.raises(ValueError, match="top_p: got an index of pages"):
        la.retrieval_attention(queries(rng), s, bounds, top_p=0.5)
