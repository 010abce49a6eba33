"""Graphs: what their searches find and at what cost, how they follow their store, and what they refuse."""

import re

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn import vectors
from longattn.reference import retrieval as reference
from random_arrays import BF16, DTYPES, F32, normal
from random_stores import queries, rows, store, store_of

CALL = {"sinks": 4, "window": 100, "return_selected": True}
LENGTH = 6144


def flat(q, s, top_k, **call):
    return la.retrieval_attention(q, s, la.index.Flat(s), top_k=top_k, **(CALL | call))


def hard_head(number=0, length=LENGTH, groups=12):
    """A head whose queries lie away from its keys; its queries [groups, 4, D] and those of its prefill [4, n, D]."""
    made = vectors.load("synthetic", length=length, groups=groups, heads=[str(number)], seed=7)
    return made.keys, made.values, made.queries, np.ascontiguousarray(made.prefill_queries.swapaxes(0, 1))


def mean_recall(s, index, asked, top_k=100):
    """Mean recall over some query groups, and mean number of keys scored."""
    recalls, scored = [], []
    for q in asked:
        result = la.retrieval_attention(q[:, None], s, index, top_k=top_k, **CALL)
        best = flat(q[:, None], s, top_k)
        recalls.append(la.retrieval.recall(result.stats.selected, best.stats.selected))
        scored.append(result.stats.keys_scored)
    return np.mean(recalls), np.mean(scored)


@pytest.mark.parametrize("number", [0, 3])
def test_training_by_queries_finds_no_less(number):
    """At the same beam: a graph around queries against one of the keys alone, on queries out of distribution."""
    keys, values, asked, prefill = hard_head(number)
    s = store_of(keys, values, BF16)
    trained = mean_recall(s, la.index.Graph(s, prefill), asked)
    alone = mean_recall(s, la.index.Graph(s), asked)
    assert trained[0] >= alone[0] - 0.005, (trained, alone)
    assert trained[0] > 0.9, (trained, alone)
    assert trained[1] < 4 * 0.5 * LENGTH, (trained, alone)


@pytest.mark.parametrize("kk_metric", ["l2", "ip", "cos"])
@pytest.mark.parametrize("index_per", ["kv_head", "query_head"])
def test_options_find_most(kk_metric, index_per):
    keys, values, asked, prefill = hard_head(1, 4400, groups=5)
    s = store_of(keys, values, BF16)
    index = la.index.Graph(s, prefill, kk_metric=kk_metric, index_per=index_per, beam=60)
    found, _ = mean_recall(s, index, asked)
    assert found > 0.85, found
    graphs = 4 if index_per == "query_head" else 1
    norms = 0 if kk_metric == "ip" else 4
    sample = prefill.shape[0] * prefill.shape[1]
    assert index.nbytes == 4400 * (graphs * (4 * 64 + 1) + norms) + sample * (4 * 128 + 12)


def test_wider_beams_find_more_and_cost_more():
    keys, values, asked, prefill = hard_head(2)
    s = store_of(keys, values, BF16)
    recalls, scored = zip(
        *[mean_recall(s, la.index.Graph(s, prefill, ef=ef, beam=60), asked, 20) for ef in (20, 80, 400)], strict=True
    )
    assert recalls[0] <= recalls[1] + 0.01 and recalls[1] <= recalls[2] + 0.01, recalls
    assert scored[0] < scored[1] < scored[2]
    assert recalls[2] > 0.97, recalls


def test_the_mean_query_is_one_search():
    keys, values, asked, prefill = hard_head(0, 4800, groups=4)
    s = store_of(keys, values, BF16)
    each, mean = (mean_recall(s, la.index.Graph(s, prefill, search_by=by, beam=60), asked) for by in ("head", "mean"))
    assert mean[1] < each[1] / 2 and mean[0] <= each[0] + 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_what_is_read_is_exact(rng, isa, dtype, trained):
    s = store(rng, 2, 4200, 20, 12, dtype=dtype)
    index = la.index.Graph(s, queries(rng, 4, 40, 20) if trained else None, beam=20, neighbours=12, max_degree=24)
    q = queries(rng, 4, 2, 20)
    result = la.retrieval_attention(q, s, index, top_k=20, **CALL)
    oracle = reference.attention(q, s.keys, s.values, result.stats.selected, 4200, sinks=4, window=100)
    tolerances.attention(q, s.keys, s.values).check(result.out, oracle.out, result.lse, oracle.lse)
    for head in result.stats.selected:
        for i, picked in enumerate(head):
            assert len(picked) == 20 and (np.diff(picked.astype(int)) > 0).all()
            assert np.isin(picked, reference.candidates(4200 - 1 + i, 4200, 4, 100)).all()
    assert (result.stats.keys_scored < 2 * 4200).all() and (result.stats.index_bytes > 0).all()


def test_the_same_graph_whatever_the_threads(rng, tmp_path):
    keys, values = rows(rng, 2, 4800, 16)
    sample, q = queries(rng, 4, 60, 16), queries(rng, 4, 3, 16)
    before = la.get_num_threads()
    files, outs = [], []
    for count in (1, 2, 3):
        la.set_num_threads(count)
        s = store_of(keys[:, :4200], values[:, :4200])
        index = la.index.Graph(s, sample, beam=24, tail_max=100)
        index.update()
        s.append(keys[:, 4200:], values[:, 4200:])
        outs.append(la.retrieval_attention(q, s, index, top_k=25, **CALL))
        index.save(tmp_path / str(count))
        files.append((tmp_path / str(count)).read_bytes())
    la.set_num_threads(before)
    assert files[0] == files[1] == files[2]
    for other in outs[1:]:
        np.testing.assert_array_equal(outs[0].out, other.out)
        np.testing.assert_array_equal(outs[0].stats.keys_scored, other.stats.keys_scored)


def test_growth_keeps_recall():
    """A tenth more rows, in steps: as good as a graph built of all of them."""
    keys, values, asked, prefill = hard_head(4)
    first = LENGTH * 10 // 11
    s = store_of(keys[:, :first], values[:, :first], BF16)
    grown = la.index.Graph(s, prefill, tail_max=256)
    grown.update()
    before, _ = mean_recall(s, grown, asked)
    for start in range(first, LENGTH, 100):
        s.append(keys[:, start : min(start + 100, LENGTH)], values[:, start : min(start + 100, LENGTH)])
        grown.update()
    assert LENGTH - 256 <= len(grown) <= LENGTH
    after, _ = mean_recall(s, grown, asked)
    at_once, _ = mean_recall(s, la.index.Graph(s, prefill), asked)
    assert after > before - 0.02 and after > at_once - 0.02, (before, after, at_once)


def test_rows_that_wait_are_scanned(rng):
    keys, values = rows(rng, 1, 5000, 16)
    keys[:, 4700] *= 5
    s = store_of(keys[:, :4100], values[:, :4100])
    index = la.index.Graph(s, beam=24, tail_max=900)
    index.update()
    assert len(index) == 4100
    q = keys[:, 4700:4701]
    s.append(keys[:, 4100:], values[:, 4100:])
    result = la.retrieval_attention(q, s, index, top_k=5, **CALL)
    assert len(index) == 4100
    assert 4700 in result.stats.selected[0][0]
    assert result.stats.keys_scored[0, 0] >= 800
    s.append(keys[:, :1], values[:, :1])
    la.retrieval_attention(q, s, index, top_k=5, **CALL)
    assert len(index) == 5001


def test_small_stores_are_scanned(rng):
    s = store(rng, 2, 4095, 16)
    index = la.index.Graph(s, queries(rng, 2, 10, 16))
    q = queries(rng, 2, dim=16)
    result = la.retrieval_attention(q, s, index, top_k=30, **CALL)
    np.testing.assert_array_equal(result.out, flat(q, s, 30).out)
    assert (result.stats.keys_scored == 4095 - 104).all() and len(index) == 0
    s.append(*rows(rng, 2, 1, 16))
    index.update()
    assert len(index) == 4096


def test_truncate(rng):
    keys, values, asked, prefill = hard_head(5, groups=6)
    s = store_of(keys, values, BF16)
    index = la.index.Graph(s, prefill, tail_max=0, beam=60)
    index.update()
    for length in (6000, 5600, 5000):
        s.truncate(length)
        found, _ = mean_recall(s, index, asked)
        assert len(index) == length
        assert found > 0.85, (length, found)
        # Nothing that was dropped is found, and a beam of all rows finds the rest.
        q = asked[0][:, None]
        wide = la.index.Graph(s, prefill, ef=length, beam=30)
        np.testing.assert_array_equal(la.retrieval_attention(q, s, wide, top_k=40, **CALL).out, flat(q, s, 40).out)
    s.append(keys[:, 5000:6100], values[:, 5000:6100])
    found, _ = mean_recall(s, index, asked)
    assert len(index) == 6100 and found > 0.85
    s.truncate(1000)
    result = la.retrieval_attention(q, s, index, top_k=40, **CALL)
    np.testing.assert_array_equal(result.out, flat(q, s, 40).out)
    assert len(index) == 0
    s.append(keys[:, 1000:5000], values[:, 1000:5000])
    index.update()
    assert len(index) == 5000


def test_fork_and_file(rng, tmp_path):
    s = store(rng, 2, 4500, 16)
    sample = queries(rng, 4, 30, 16)
    for per in ("kv_head", "query_head"):
        index = la.index.Graph(s, sample, beam=24, tail_max=100, index_per=per, kk_metric="cos", search_by="mean")
        index.update()
        index.save(tmp_path / "index")
        loaded = la.index.Graph.load(tmp_path / "index", s)
        q = queries(rng, 4, 2, 16)
        one, other = (la.retrieval_attention(q, s, i, top_k=30, **CALL) for i in (index, loaded))
        np.testing.assert_array_equal(one.out, other.out)
        np.testing.assert_array_equal(one.stats.keys_scored, other.stats.keys_scored)
        assert loaded.parameters == index.parameters and loaded.parameters["kk_metric"] == "cos"
        assert (len(loaded), loaded.nbytes) == (4500, index.nbytes)
    # A store that was truncated before the loaded index was ever used.
    again = la.index.Graph.load(tmp_path / "index", s)
    forked = s.fork()
    copy = index.fork(forked)
    s.truncate(4200)
    result = la.retrieval_attention(q, s, again, top_k=30, **CALL)
    assert len(again) == 4200 and all(x.max() < 4200 for head in result.stats.selected for x in head)
    forked.truncate(4300)
    forked.append(*rows(rng, 2, 300, 16))
    la.retrieval_attention(q, forked, copy, top_k=30, **CALL)
    assert len(copy) == 4600


def test_damaged_links_are_refused(rng, tmp_path):
    s = store(rng, 1, 4200, 8)
    index = la.index.Graph(s, beam=8, neighbours=8, max_degree=16)
    index.update()
    path = tmp_path / "index"
    index.save(path)
    whole = path.read_bytes()
    for place in np.random.default_rng(1).integers(0, len(whole), 30):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="index"):
            la.index.Graph.load(path, s)


@pytest.mark.parametrize("kk_metric", ["l2", "ip", "cos"])
def test_equal_keys(rng, kk_metric):
    """Duplicates, constant keys and keys of zeros: all within reach, and found by a beam of all rows."""
    keys, values = rows(rng, 1, 4200, 8)
    keys[:, 1000:4000] = keys[:, 1000:1001]
    for k in (keys, np.zeros_like(keys), np.ones_like(keys)):
        s = store_of(k, values)
        index = la.index.Graph(s, queries(rng, 2, 20, 8), kk_metric=kk_metric, beam=16, ef=4200)
        q = queries(rng, 2, dim=8)
        result, exact = la.retrieval_attention(q, s, index, top_k=50, **CALL), flat(q, s, 50)
        np.testing.assert_array_equal(result.stats.selected[0][0], exact.stats.selected[0][0])
        np.testing.assert_array_equal(result.out, exact.out)


def test_large_windows_and_few_candidates(rng):
    s = store(rng, 1, 5000, 16)
    index, q = la.index.Graph(s, beam=20), queries(rng, 2, dim=16)
    for window in (4000, 4990, 10_000):
        result = la.retrieval_attention(q, s, index, top_k=7, sinks=4, window=window, return_selected=True)
        np.testing.assert_array_equal(result.out, flat(q, s, 7, window=window).out)


def test_keys_that_no_graph_can_rank_are_refused(rng):
    keys, values = rows(rng, 1, 4500, 16)
    keys[0, 4400, 2] = np.nan
    s = store_of(keys, values)
    index = la.index.Graph(s, beam=10)
    with pytest.raises(ValueError, match="NaN or infinity in key 4400 of head 0"):
        index.update()
    s.truncate(4400)
    index.update()
    assert len(index) == 4400
    s.append(np.full((1, 1, 16), 1e30, F32), values[:, :1])
    index.update()
    index = la.index.Graph(s, beam=10, kk_metric="l2")
    with pytest.raises(ValueError, match="key 4400 of head 0, whose squared norm is beyond float32"):
        index.update()


SAMPLE = normal(np.random.default_rng(0), (4, 6, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"queries": SAMPLE[:3]}, ValueError, "queries: got shape (3, 6, 8), expected [a multiple of 2"),
        ({"queries": SAMPLE[..., :7]}, ValueError, "queries: got shape (4, 6, 7)"),
        ({"queries": SAMPLE[:, :0]}, ValueError, "queries: got shape (4, 0, 8)"),
        ({"queries": SAMPLE[0]}, ValueError, "queries: got shape (6, 8)"),
        ({"queries": SAMPLE.astype(int)}, TypeError, "queries: got dtype int64"),
        ({"queries": SAMPLE.tolist()}, TypeError, "queries: got list"),
        ({"queries": SAMPLE * np.nan}, ValueError, "queries: got NaN or infinity, expected finite numbers"),
        ({"neighbours": 0}, ValueError, "neighbours: got 0, expected 1 to 100"),
        ({"neighbours": 60}, ValueError, "max_degree: got 64, expected at least neighbours + 8 = 68"),
        ({"max_degree": 129}, ValueError, "max_degree: got 129, expected 9 to 128"),
        ({"query_neighbours": 1}, ValueError, "query_neighbours: got 1"),
        ({"beam": 0}, ValueError, "beam: got 0"),
        ({"beam": 1.5}, TypeError, "beam: got 1.5, expected an integer"),
        ({"ef": 0}, ValueError, "ef: got 0"),
        ({"ef": True}, TypeError, "ef: got True"),
        ({"tail_max": -1}, ValueError, "tail_max: got -1"),
        ({"kk_metric": "L2"}, ValueError, "kk_metric: got 'L2', expected 'l2', 'ip' or 'cos'"),
        ({"index_per": "head"}, ValueError, "index_per: got 'head'"),
        ({"index_per": "query_head"}, ValueError, "index_per: got 'query_head' without queries"),
        ({"search_by": None}, ValueError, "search_by: got None"),
        ({"seed": 1 << 64}, ValueError, "seed: got"),
    ],
)
def test_bad_arguments(rng, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        la.index.Graph(store(rng, 2, 20, 8), **arguments)


def test_no_budget_of_mass_and_no_estimate_of_the_rest(rng):
    s = store(rng, 1, 600, 16)
    index, q = la.index.Graph(s), queries(rng, 1, dim=16)
    with pytest.raises(ValueError, match="top_p: got an index of graph that estimates nothing"):
        la.retrieval_attention(q, s, index, top_p=0.5)
    with pytest.raises(ValueError, match="rest: got values with graph"):
        la.retrieval_attention(q, s, index, top_k=5, rest="values")
