"""Identities of retrieval attention over the indexes that score keys themselves."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from random_arrays import BF16
from random_stores import queries, rows, store, store_of

ROWS, DIM = 4300, 24
CALL = {"sinks": 8, "window": 64}


@pytest.fixture(scope="module")
def held():
    """A store, queries of six heads at two positions, and indexes of each kind."""
    rng = np.random.default_rng(11)
    s = store(rng, 2, ROWS, DIM, dtype=BF16)
    indexes = {
        "flat": la.index.Flat(s),
        "graph": la.index.Graph(s, queries(rng, 6, 50, DIM), beam=30),
        "inverted_lists": la.index.InvertedLists(s, nprobe=4),
    }
    return s, queries(rng, 6, 2, DIM), indexes


KINDS = pytest.mark.parametrize("kind", ["flat", "graph", "inverted_lists"])


@KINDS
def test_a_budget_of_every_row_is_causal_attention(held, isa, kind):
    s, q, indexes = held
    result = la.retrieval_attention(q, s, indexes[kind], top_k=ROWS, **CALL)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)
    assert (result.stats.missed_mass == 0).all()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kk_metric", ["l2", "ip", "cos"])
def test_a_search_for_every_row_is_the_exact_scan(held, trained, kk_metric):
    """The graph is connected: a beam of all rows scores each once, and the same rows come out as from the scan."""
    s, q, indexes = held
    sample = queries(np.random.default_rng(5), 2, 40, DIM) if trained else None
    graph = la.index.Graph(s, sample, beam=16, ef=ROWS, kk_metric=kk_metric)
    call = {"top_k": 60, "return_selected": True, **CALL}
    found, exact = (la.retrieval_attention(q, s, index, **call) for index in (graph, indexes["flat"]))
    np.testing.assert_array_equal(la.retrieval.recall(found.stats.selected, exact.stats.selected), 1)
    np.testing.assert_array_equal(found.out, exact.out)
    np.testing.assert_array_equal(found.lse, exact.lse)
    # Three query heads walk over all linked rows, those outside the candidates as well.
    assert (found.stats.keys_scored == 3 * ROWS).all()


@KINDS
def test_the_merged_lse_is_that_of_steady_and_picked_rows(held, isa, kind):
    s, q, indexes = held
    result = la.retrieval_attention(q, s, indexes[kind], top_k=33, return_selected=True, **CALL)
    oracle = reference.attention(q, s.keys, s.values, result.stats.selected, ROWS, **CALL)
    tolerances.attention(q, s.keys, s.values).check(result.out, oracle.out, result.lse, oracle.lse)
    # The same from the two parts, merged.
    for i in range(2):
        total = ROWS - 1 + i
        for h in range(2):
            picked = result.stats.selected[h][i]
            steady = np.r_[0:8, total - 64 : total]
            heads = q[3 * h : 3 * h + 3, i : i + 1]
            parts = [
                la.attention(heads, s.keys[h : h + 1, r], s.values[h : h + 1, r], return_lse=True)
                for r in (steady, picked)
            ]
            out, lse = la.merge([(x.astype(np.float32), y) for x, y in parts])
            got = result.out[3 * h : 3 * h + 3, i : i + 1], result.lse[3 * h : 3 * h + 3, i : i + 1]
            tolerances.same_storage(q, s.keys, s.values).check(got[0], out, got[1], lse)


def test_recovery_is_the_share_of_the_mass(held):
    s, q, indexes = held
    _, full = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    result = la.retrieval_attention(q, s, indexes["flat"], top_k=50, return_selected=True, **CALL)
    oracle = reference.attention(q, s.keys, s.values, result.stats.selected, ROWS, **CALL)
    ratio = la.retrieval.recovery_ratio(result.lse, full)
    np.testing.assert_allclose(ratio, 1 - oracle.missed_mass, atol=1e-4)
    # No index holds more of the mass, summed over the group, than the exact scan.
    others = (la.retrieval_attention(q, s, indexes[kind], top_k=50, **CALL) for kind in ("graph", "inverted_lists"))
    for other in others:
        share = la.retrieval.recovery_ratio(other.lse, full).reshape(2, 3, 2).mean(1)
        assert (share <= ratio.reshape(2, 3, 2).mean(1) + 1e-5).all()
    with pytest.raises(ValueError, match="lse: got shape"):
        la.retrieval.recovery_ratio(result.lse[:1], full)


def test_recall():
    lists = [[np.array([1, 5, 9], np.uint32)], [np.array([], np.uint32)]]
    best = [[np.array([5, 9, 11, 12], np.uint32)], [np.array([], np.uint32)]]
    np.testing.assert_array_equal(la.retrieval.recall(lists, best), [[0.5], [1.0]])
    with pytest.raises(ValueError, match="selected: got"):
        la.retrieval.recall(lists, best[:1])


def test_a_step_is_a_row_of_a_prefill(held, isa):
    """Each query sees the rows up to its own and picks among them as alone."""
    s, q, _ = held
    for make in (la.index.Flat, la.index.Graph, la.index.InvertedLists):
        short = store_of(np.asarray(s.keys[:, :-1]), np.asarray(s.values[:, :-1]), BF16)
        together = la.retrieval_attention(q, s, make(s), top_k=ROWS // 2, return_selected=True, **CALL)
        alone = la.retrieval_attention(q[:, :1], short, make(short), top_k=ROWS // 2, return_selected=True, **CALL)
        if make is la.index.Flat:
            np.testing.assert_array_equal(together.out[:, :1], alone.out)
        assert (alone.stats.keys_total == ROWS - 1).all()
        assert all(head[0].max() < ROWS - 1 - 64 for head in together.stats.selected)


def test_rows_of_zero_and_one_candidate(held):
    rng = np.random.default_rng(3)
    s = store_of(*rows(rng, 1, 70, 8))
    q = queries(rng, 1, dim=8)
    for make in (la.index.Flat, la.index.Graph, la.index.InvertedLists):
        for window in (69, 70, 71):
            result = la.retrieval_attention(q, s, make(s), top_k=1, sinks=0, window=window)
            out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
            tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)
