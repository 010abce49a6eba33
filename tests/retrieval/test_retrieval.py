"""Retrieval attention against the oracle over the rows it read, and against dense attention where it reads all."""

import hashlib
import subprocess
import sys
import threading

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn import _core
from longattn.reference import retrieval as reference
from random_arrays import BF16, DTYPES, F16, F32, normal
from random_stores import queries, rows, store, store_of
from running import on_threads


def check_read_rows(q, s, index, result, **call):
    """The output is the softmax over the rows that were read; returns the oracle."""
    oracle = reference.attention(q, s.keys, s.values, result.stats.selected, len(index), **call)
    tolerance = tolerances.attention(q, s.keys, s.values, scale=call.get("scale"), together=8)
    tolerance.check(result.out, oracle.out, result.lse, oracle.lse)
    return oracle


#: (query heads, KV heads, rows, head_dim, value_dim)
SHAPES = [
    (1, 1, 700, 32, 32),
    (6, 2, 1003, 64, 16),
    (5, 1, 640, 33, 1),
    (7, 1, 999, 3, 40),
    (2, 2, 530, 1, 7),
    (64, 1, 600, 20, 20),
    (8, 1, 2049, 128, 128),
    (4, 2, 777, 16, 300),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_rows_read_are_exact(rng, isa, shape, bits):
    heads, kv_heads, count, dim, value_dim = shape
    s = store(rng, kv_heads, count, dim, value_dim)
    index = la.index.Signatures(s, bits=bits)
    q = queries(rng, heads, dim=dim)
    for sinks, window, top_k in [(4, 100, 20), (0, 0, 1), (3, 17, 300)]:
        call = {"sinks": sinks, "window": window}
        result = la.retrieval_attention(q, s, index, top_k=top_k, rest="none", return_selected=True, **call)
        check_read_rows(q, s, index, result, **call)
        among = reference.candidates(count, len(index), sinks, window)
        for (picked,) in result.stats.selected:
            assert len(picked) == min(top_k, len(among)) and np.isin(picked, among).all()
            assert (np.diff(picked.astype(np.int64)) > 0).all()
        assert (result.stats.keys_total == count).all()
        assert (result.stats.keys_scored == len(among)).all()
        assert (result.stats.keys_attended == count - len(among) + min(top_k, len(among))).all()


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("asked", DTYPES, ids=str)
def test_dtypes(rng, isa, stored, asked):
    s = store(rng, 2, 900, 48, dtype=stored)
    index = la.index.Signatures(s)
    q = queries(rng, 4, 2, dim=48, dtype=asked)
    call = {"sinks": 5, "window": 60}
    result = la.retrieval_attention(q, s, index, top_k=25, rest="none", return_selected=True, **call)
    assert result.out.dtype == asked and result.lse.dtype == np.float32
    check_read_rows(q, s, index, result, **call)


@pytest.mark.parametrize("rest", ["values", "none"])
@pytest.mark.parametrize(
    ("count", "call"),
    [
        (1003, {"top_k": 5000}),
        (1003, {"top_k": 1003 - 104, "window": 100}),
        (1003, {"top_k": 1, "window": 10_000}),
        (1003, {"top_k": 1, "sinks": 10_000, "window": 0}),
        (1003, {"top_k": 1, "sinks": 600, "window": 600}),
        (511, {"top_k": 1, "sinks": 0, "window": 0}),  # no codes yet
        (1, {"top_k": 1}),
        (17, {"top_k": 1, "sinks": 0, "window": 3}),
        (512, {"top_k": 512, "sinks": 0, "window": 0}),
    ],
    ids=str,
)
def test_reading_everything_is_dense_attention(rng, isa, count, call, rest):
    s = store(rng, 2, count, 40, 24, dtype=BF16)
    index = la.index.Signatures(s, bits=2)
    q = queries(rng, 6, dim=40)
    sink_logits = normal(rng, (6,), spread=3.0)
    result = la.retrieval_attention(q, s, index, rest=rest, sink_logits=sink_logits, **call)
    out, lse = la.attention(q, s.keys, s.values, causal=True, sinks=sink_logits, return_lse=True)
    tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)
    assert (result.stats.keys_attended == count).all() and result.stats.fraction_attended == 1
    assert (result.stats.missed_mass == 0).all() and (result.stats.missed_mass_bound == 0).all()


def test_scale_and_sink_logits(rng, isa):
    s = store(rng)
    index = la.index.Signatures(s)
    q, sink_logits = queries(rng, 4, 2), normal(rng, (4,), spread=4.0)
    call = {"scale": 0.31, "sink_logits": sink_logits, "window": 40}
    result = la.retrieval_attention(q, s, index, top_k=30, rest="none", return_selected=True, **call)
    check_read_rows(q, s, index, result, **call)
    # The extra logit takes mass from the output, and nothing else changes.
    without = la.retrieval_attention(q, s, index, top_k=30, rest="none", scale=0.31, window=40)
    share = np.exp(without.lse - result.lse)
    np.testing.assert_allclose(result.out, without.out * share[..., None], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(result.stats.missed_mass, without.stats.missed_mass)


def test_several_queries_are_steps_of_one_each(rng, isa):
    """Each row sees the rows up to its own, selects on its own, and what it reads has the same bits as alone."""
    s = store(rng, count=1024)
    index = la.index.Signatures(s)
    index.update()
    s.append(*rows(rng, count=45))
    q = queries(rng, 4, 40)
    call = {"top_k": 12, "window": 64, "return_selected": True}
    together = la.retrieval_attention(q, s, index, rest="none", **call)
    check_read_rows(q, s, index, together, window=64)
    estimated = la.retrieval_attention(q, s, index, **call)
    for i in reversed(range(40)):
        s.truncate(1069 - 39 + i)
        alone = la.retrieval_attention(q[:, i : i + 1], s, index, rest="none", **call)
        np.testing.assert_array_equal(together.out[:, i : i + 1], alone.out)
        np.testing.assert_array_equal(together.lse[:, i : i + 1], alone.lse)
        for h in range(2):
            np.testing.assert_array_equal(together.stats.selected[h][i], alone.stats.selected[h][0])
        np.testing.assert_array_equal(together.stats.keys_total[:, i], [s.keys.shape[1]] * 2)
        for name in ("keys_scored", "keys_attended", "missed_mass", "missed_mass_bound"):
            np.testing.assert_array_equal(getattr(together.stats, name)[:, i : i + 1], getattr(alone.stats, name))
        # The mean values of clusters are those of all rows of the store.
        one = la.retrieval_attention(q[:, i : i + 1], s, index, **call)
        np.testing.assert_allclose(estimated.out[:, i : i + 1], one.out, atol=0.05)
        np.testing.assert_array_equal(estimated.lse[:, i : i + 1], one.lse)


def test_batch_axis_and_statistics_on_demand(rng):
    s = store(rng)
    index = la.index.Signatures(s)
    q = queries(rng, 4, 3)
    plain = la.retrieval_attention(q, s, index, top_k=9, window=50)
    batched = la.retrieval_attention(q[None], s, index, top_k=9, window=50, return_stats=False)
    assert batched.out.shape == (1, 4, 3, 32) and batched.lse.shape == (1, 4, 3)
    np.testing.assert_array_equal(batched.out[0], plain.out)
    np.testing.assert_array_equal(batched.lse[0], plain.lse)
    assert batched.stats is None and plain.stats.selected == [[], []]
    empty = la.retrieval_attention(q[:, :0], s, index, top_k=9)
    assert empty.out.shape == (4, 0, 32) and empty.lse.shape == (4, 0)
    assert empty.stats.keys_total.shape == (2, 0) and empty.stats.fraction_attended == 0


def test_strided_queries(rng):
    s = store(rng)
    index = la.index.Signatures(s)
    q = queries(rng, 4, 6)
    expected = la.retrieval_attention(q, s, index, top_k=9, window=50).out
    for strided in (np.ascontiguousarray(q.swapaxes(0, 1)).swapaxes(0, 1), np.repeat(q, 2, axis=-1)[..., ::2]):
        np.testing.assert_array_equal(la.retrieval_attention(strided, s, index, top_k=9, window=50).out, expected)


def test_the_group_shares_its_rows(rng, isa):
    """One selection per KV head: by the mean share of the group, whatever the order of its query heads."""
    s = store(rng, 2, 2000)
    index = la.index.Signatures(s)
    q = queries(rng, 8)
    order = np.array([2, 0, 3, 1, 7, 6, 4, 5])
    call = {"top_k": 40, "window": 32, "return_selected": True}
    one, other = (la.retrieval_attention(x, s, index, **call) for x in (q, q[order]))
    np.testing.assert_array_equal(one.stats.keys_attended, other.stats.keys_attended)
    weights = np.exp(np.einsum("hld,hnd->hn", q.astype(np.float64), np.repeat(s.keys, 4, 0)) * 32**-0.5)
    weights /= weights.sum(-1, keepdims=True)
    for h in range(2):
        np.testing.assert_array_equal(one.stats.selected[h][0], other.stats.selected[h][0])
        # 4-bit codes find nearly all that the best shared set holds.
        mean = weights[4 * h : 4 * h + 4].mean(0)[4:-32]
        held = mean[one.stats.selected[h][0] - 4].sum()
        assert held > 0.98 * np.sort(mean)[-40:].sum()
    np.testing.assert_allclose(other.out, one.out[order], rtol=1e-5, atol=1e-6)


def test_top_p_reads_what_holds_the_mass(rng, isa):
    s = store(rng, 2, 3000, 64)
    index = la.index.Signatures(s)
    q = queries(rng, 4, dim=64, spread=2.0)
    previous = 0
    for p in (0.2, 0.5, 0.9, 0.99):
        result = la.retrieval_attention(q, s, index, top_p=p, window=64, rest="none", return_selected=True)
        oracle = check_read_rows(q, s, index, result, window=64)
        assert (oracle.missed_mass < 1 - p + 0.02).all()
        assert (result.stats.missed_mass < 1 - p + 0.01).all()
        # The fewest rows: one head of each group has just the mass (a bin of weights more at most).
        assert (oracle.missed_mass.reshape(2, 2).max(-1) > (1 - p) * 0.8 - 0.01).all()
        attended = int(result.stats.keys_attended.sum())
        assert previous < attended < 6000
        previous = attended


def test_top_p_selects_nothing_where_steady_rows_hold_enough(rng, isa):
    keys, values = rows(rng, 1, 2000)
    keys[:, -1] = 0
    s = store_of(keys, values)
    q = queries(rng, 2)
    keys[0, -1] = 8 * q[:, 0].mean(0)  # the last row outweighs all others
    s.truncate(1999)
    s.append(keys[:, -1:], values[:, -1:])
    result = la.retrieval_attention(q, s, la.index.Signatures(s), top_p=0.5, window=16, return_selected=True)
    assert result.stats.selected[0][0].size == 0
    assert (result.stats.keys_attended == 4 + 16).all()


def test_the_rest_comes_from_value_clusters(rng, isa):
    """On a flat head the rows that are read hold little: leaving the rest out costs far more than estimating it."""
    keys, values = rows(rng, 2, 6000, 64, spread=0.4)
    values += 2 * normal(rng, (2, 16, 64))[:, rng.integers(0, 16, 6000)]  # 16 kinds of values
    s = store_of(keys, values)
    index = la.index.Signatures(s)
    q = queries(rng, 4, dim=64)
    exact, exact_lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    results = {rest: la.retrieval_attention(q, s, index, top_k=60, window=64, rest=rest) for rest in ("values", "none")}
    error = {rest: np.linalg.norm(r.out - exact, axis=-1) for rest, r in results.items()}
    assert (results["none"].stats.missed_mass > 0.5).all()
    assert (error["values"] < 0.2 * error["none"]).all()
    assert (np.abs(results["values"].lse - exact_lse) < 0.02).all()
    assert (np.abs(results["none"].lse - exact_lse) > 0.5).all()
    np.testing.assert_array_equal(results["values"].stats.missed_mass, results["none"].stats.missed_mass)
    # The default estimates the rest.
    np.testing.assert_array_equal(la.retrieval_attention(q, s, index, top_k=60, window=64).out, results["values"].out)


def test_parts_merge(rng):
    """`lse` is what `merge` needs: two halves of the keys make the whole."""
    s = store(rng, 2, 1600)
    index = la.index.Signatures(s)
    q = queries(rng)
    other_k, other_v = rows(rng, 2, 300)
    part = la.retrieval_attention(q, s, index, top_k=5000)
    out, lse = la.merge([(part.out, part.lse), la.attention(q, other_k, other_v, return_lse=True)])
    keys, values = (np.concatenate(x, axis=1) for x in ((s.keys, other_k), (s.values, other_v)))
    whole = la.attention(q, keys, values, return_lse=True)
    tolerances.same_storage(q, keys, values).check(out, whole[0], lse, whole[1])


# Odd keys


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_constant_keys(rng, bits, dtype, value):
    """All logits equal: every estimate is exact, and the lowest rows are selected."""
    _, values = rows(rng, 1, 900)
    s = store_of(np.full((1, 900, 32), value, np.float32), values, dtype)
    index = la.index.Signatures(s, bits=bits)
    q = queries(rng, 2)
    result = la.retrieval_attention(q, s, index, top_k=10, window=20, return_selected=True)
    exact, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    np.testing.assert_allclose(result.lse, lse, atol=1e-4)
    np.testing.assert_allclose(result.out, exact, atol=0.03)
    np.testing.assert_allclose(result.stats.missed_mass, 866 / 900, atol=1e-4)
    np.testing.assert_array_equal(result.stats.selected[0][0], np.arange(4, 14))
    # Keys that differ come later: the scale of the codes follows them.
    s.append(*rows(rng, 1, 300))
    result = la.retrieval_attention(q, s, index, top_k=10, window=20, rest="none", return_selected=True)
    oracle = check_read_rows(q, s, index, result, window=20)
    assert np.isfinite(result.out).all() and (result.stats.missed_mass_bound >= oracle.missed_mass - 1e-6).all()
    np.testing.assert_allclose(result.stats.missed_mass, oracle.missed_mass, atol=[0, 0.3, 0.15, 0, 0.05][bits])


def test_duplicate_keys_tie_to_the_lower_row(rng, isa):
    keys, values = rows(rng, 1, 40)
    s = store_of(np.tile(keys, (1, 26, 1)), np.tile(values, (1, 26, 1)))
    index = la.index.Signatures(s)
    q = queries(rng, 1)
    result = la.retrieval_attention(q, s, index, top_k=62, sinks=0, window=0, return_selected=True)
    picked = result.stats.selected[0][0]
    # 26 copies of each key: the best two come whole, of the third the first ten.
    kinds, counts = np.unique(picked % 40, return_counts=True)
    assert sorted(counts) == [10, 26, 26]
    third = kinds[counts == 10][0]
    np.testing.assert_array_equal(picked[picked % 40 == third], third + 40 * np.arange(10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_keys(rng, isa, dtype):
    """Logits in the thousands, codes that err by tens: still finite, ranked, and bounded honestly."""
    keys, values = rows(rng, 1, 1500, 64, spread=1e4 / 8, offset=0)
    s = store_of(keys, values, dtype)
    q = queries(rng, 3, dim=64, spread=1.0)
    for bits in (1, 4):
        index = la.index.Signatures(s, bits=bits)
        result = la.retrieval_attention(q, s, index, top_k=200, window=16, return_selected=True)
        assert np.isfinite(result.out).all() and np.isfinite(result.lse).all()
        oracle = reference.attention(q, s.keys, s.values, result.stats.selected, len(index), window=16)
        assert (result.stats.missed_mass_bound >= oracle.missed_mass - 1e-6).all()
        none = la.retrieval_attention(q, s, index, top_k=200, window=16, rest="none", return_selected=True)
        check_read_rows(q, s, index, none, window=16)
    # Most weights underflow, and still rows are ranked by their logits: the best few of 1500 are among 200.
    logits = np.einsum("hld,nd->hn", q.astype(np.float64), s.keys[0].astype(np.float64))
    assert np.isin(logits[:, 4:-16].argmax(-1) + 4, none.stats.selected[0][0]).all()


def test_keys_of_very_different_norms(rng):
    """One far longer key costs the others no precision, whether it was there at the fit or came later."""
    keys, values = rows(rng, 1, 1100)
    keys[0, 700] *= 200
    q = queries(rng, 1)
    for first in (600, 1100):
        s = store_of(keys[:, :first], values[:, :first])
        index = la.index.Signatures(s)
        index.update()
        s.append(keys[:, first:], values[:, first:])
        index.update()
        q[0, 0] -= keys[0, 700] * (q[0, 0] @ keys[0, 700]) / (keys[0, 700] @ keys[0, 700])
        result = la.retrieval_attention(q, s, index, top_k=30, window=20, sinks=0, return_selected=True)
        oracle = reference.attention(q, s.keys, s.values, result.stats.selected, len(index), window=20, sinks=0)
        best = np.sort(keys[0, :1080] @ q[0, 0])[-30:]
        picked = np.sort(keys[0, result.stats.selected[0][0]] @ q[0, 0])
        assert np.median(picked) > np.median(best) - 0.5
        assert (oracle.missed_mass <= result.stats.missed_mass_bound).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_keys_that_are_not_finite(rng, bad):
    s = store(rng, count=800)
    index = la.index.Signatures(s)
    index.update()
    keys, values = rows(rng, count=64)
    keys[1, 37, 5] = bad
    s.append(keys, values)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"store: got NaN or infinity in key 837 of head 1, expected finite"):
            la.retrieval_attention(queries(rng), s, index, top_k=5)
    # Without the row all is well again, even if it was part of a fit.
    s.truncate(800)
    assert len(index) == 800
    late = la.index.Signatures(s)
    s.append(keys, values)
    with pytest.raises(ValueError, match="in key 837 of head 1"):
        late.update()
    s.truncate(830)
    for index_ in (index, late):
        result = la.retrieval_attention(q := queries(rng), s, index_, top_k=5, rest="none", return_selected=True)
        check_read_rows(q, s, index_, result)
    # A row that has no code yet is read, as dense attention reads it.
    s.truncate(800)
    s.append(keys[:, 37:38], values[:, 37:38])
    assert not np.isfinite(la.retrieval_attention(queries(rng), s, index, top_k=5).lse).all()


def test_values_that_are_not_finite_stay_where_they_are(rng):
    """NaN in a value reaches the outputs that give it weight: all that estimate it, none that left it out."""
    keys, values = rows(rng, 1, 900)
    values[0, 300] = np.nan
    s = store_of(keys, values)
    index = la.index.Signatures(s)
    q = queries(rng, 2)
    q[:, 0] -= keys[0, 300] * (q[:, 0] @ keys[0, 300] + 60)[:, None] / (keys[0, 300] @ keys[0, 300])
    call = {"top_k": 10, "window": 30, "return_selected": True}
    result = la.retrieval_attention(q, s, index, rest="none", **call)
    assert 300 not in result.stats.selected[0][0]
    check_read_rows(q, s, index, result, window=30)


def test_queries_that_are_not_finite(rng, isa):
    s = store(rng)
    index = la.index.Signatures(s)
    q = queries(rng, 4, 2)
    good = la.retrieval_attention(q, s, index, top_k=9)
    q[0, 1, 3] = np.nan
    result = la.retrieval_attention(q, s, index, top_k=9)
    assert np.isnan(result.out[0, 1]).all()
    np.testing.assert_array_equal(result.out[:, 0], good.out[:, 0])
    np.testing.assert_array_equal(result.out[2:], good.out[2:])


def test_what_the_steps_of_a_scan_took(rng):
    s = store(rng, 2, 3000, 16)
    q = queries(rng, 4, 2, 16)
    for index, scans in ((la.index.Signatures(s), True), (la.index.Flat(s), True), (la.index.Pages(s), False)):
        stats = la.retrieval_attention(q, s, index, top_k=30, window=16).stats
        for seconds in (stats.scan_seconds, stats.weigh_seconds, stats.select_seconds):
            assert seconds.shape == (2, 2) and seconds.dtype == np.float32
            assert ((seconds > 0) == scans).all() and (seconds < 60).all()


# Plain hash codes


def hash_problem(rng, kv_heads, count, dim, code_bits, *, group, rows_=1, dtype=F32):
    """Integers, so that signs and norms are the same in every arithmetic, zeros and ties included."""
    keys = rng.integers(-3, 4, (kv_heads, count, dim)).astype(np.float32)
    keys[:, 100:110] = 0
    s = store_of(keys, rows(rng, kv_heads, count, dim)[1], dtype)
    weights = rng.integers(-2, 3, (kv_heads, dim, code_bits)).astype(np.float32)
    return s, weights, rng.integers(-3, 4, (kv_heads * group, rows_, dim)).astype(np.float32)


@pytest.mark.parametrize("use_norm", [False, True])
@pytest.mark.parametrize("shape", [(128, 4, 50), (32, 1, 7), (70, 3, 400), (5, 2, 1), (256, 9, 30)], ids=str)
def test_hash_codes_rank_by_hamming_distance(rng, isa, use_norm, shape):
    code_bits, group, top_k = shape
    s, weights, q = hash_problem(rng, 2, 1000, 24, code_bits, group=group, rows_=2, dtype=BF16)
    index = la.index.Hashes(s, weights, use_norm=use_norm)
    call = {"top_k": top_k, "sinks": 3, "window": 40, "scale": 0.125}
    result = la.retrieval_attention(q, s, index, return_selected=True, **call)
    oracle = reference.hata_topk_attention(q, s.keys, s.values, weights, use_norm=use_norm, coded=len(index), **call)
    for h in range(2):
        for i in range(2):
            np.testing.assert_array_equal(result.stats.selected[h][i], oracle.selected[h][i])
    tolerance = tolerances.attention(q, s.keys, s.values, scale=0.125)
    tolerance.check(result.out, oracle.out, result.lse, oracle.lse)
    # They estimate nothing.
    assert (result.stats.missed_mass == 1).all() and (result.stats.missed_mass_bound == 1).all()


def test_hash_codes_ignore_the_length_of_keys_unless_asked(rng):
    s, weights, q = hash_problem(rng, 1, 900, 16, 64, group=2)
    stretched = store_of(s.keys * rng.integers(1, 9, (1, 900, 1)).astype(np.float32), s.values)
    chosen = {}
    for use_norm in (False, True):
        for name, of in (("plain", s), ("stretched", stretched)):
            index = la.index.Hashes(of, weights, use_norm=use_norm)
            result = la.retrieval_attention(q, of, index, top_k=20, window=16, return_selected=True)
            chosen[use_norm, name] = result.stats.selected[0][0].tolist()
    assert chosen[False, "plain"] == chosen[False, "stretched"]
    assert chosen[True, "plain"] != chosen[True, "stretched"]


# The same bits


def digest(bits, kv_heads, top):
    """Everything that a call returns, as one hash; the index is built anew."""
    rng = np.random.default_rng(7)
    s = store(rng, kv_heads, 40_000, 16, dtype=BF16)
    q = queries(rng, 2 * kv_heads, dim=16)
    index = la.index.Signatures(s, bits=bits)
    result = la.retrieval_attention(q, s, index, **top, return_selected=True)
    parts = [result.out, result.lse, result.stats.missed_mass, result.stats.missed_mass_bound, index.sigma()]
    parts += [picked for head in result.stats.selected for picked in head]
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in parts)).hexdigest()


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("top", [{"top_k": 500}, {"top_p": 0.5}], ids=str)
def test_any_number_of_threads(kv_heads, top):
    one, two, three = on_threads(lambda: digest(4, kv_heads, top))
    assert one == two == three


def test_another_process(request):
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from longattn import _core
from test_retrieval import digest
_core.set_isa({_core.isa()!r})
print(digest(2, 1, {{"top_k": 500}}))
"""
    child = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert child.stdout.strip() == digest(2, 1, {"top_k": 500})


def test_many_callers(rng):
    s = store(rng, 2, 5000)
    index = la.index.Signatures(s)
    qs = [queries(rng) for _ in range(8)]
    expected = [la.retrieval_attention(q, s, index, top_k=40).out for q in qs]
    fresh = la.index.Signatures(s)  # the first caller codes it, the others wait
    found = [None] * len(qs)

    def call(i):
        found[i] = la.retrieval_attention(qs[i], s, fresh, top_k=40).out

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(qs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    np.testing.assert_array_equal(found, expected)


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    for dtype, plain in ((torch.float32, F32), (torch.float16, F16), (torch.bfloat16, BF16)):
        s = store(rng, dtype=plain)
        index = la.index.Signatures(s)
        q = queries(rng, 4, 2, dtype=plain)
        sink_logits = normal(rng, (4,))
        tensor = torch.from_numpy(q.astype(np.float32)).to(dtype)
        result = la.retrieval_attention(tensor, s, index, top_k=9, sink_logits=torch.from_numpy(sink_logits))
        expected = la.retrieval_attention(q, s, index, top_k=9, sink_logits=sink_logits)
        assert result.out.dtype == dtype and result.lse.dtype == torch.float32
        np.testing.assert_array_equal(result.out.float().numpy(), expected.out.astype(np.float32))
        np.testing.assert_array_equal(result.lse.numpy(), expected.lse)
