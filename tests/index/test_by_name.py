"""Indexes by name, and the named ways to pick rows."""

from __future__ import annotations

import numpy as np
import pytest

import longattn as la
from longattn.index import by_name
from longattn.retrieval.ways import FURTHER, WAYS, Way, chosen

ROWS, HEADS, DIM = 2048, 2, 32


@pytest.fixture(scope="module")
def store() -> la.KVStore:
    rng = np.random.default_rng(0)
    store = la.KVStore(kv_heads=HEADS, head_dim=DIM, capacity=ROWS)
    store.append(*rng.normal(size=(2, HEADS, ROWS, DIM)).astype(np.float32))
    return store


def test_every_kind_is_known_by_its_name():
    exported = [getattr(la.index, name) for name in la.index.__all__]
    kinds = {kind for kind in exported if isinstance(kind, type) and kind is not la.index.Index}
    assert set(la.index.KINDS.values()) == kinds
    assert all(name == kind.KIND for name, kind in la.index.KINDS.items())


def test_names_of_ways_differ():
    assert len({way.name for way in (*WAYS, *FURTHER)}) == len(WAYS) + len(FURTHER)
    # The weights of an encoder are the model's: those of a further way are random.
    assert {way.kind for way in (*WAYS, *FURTHER)} == set(la.index.KINDS)
    assert {way.kind for way in WAYS} == {kind for kind in la.index.KINDS if not by_name.needed(kind)}


@pytest.mark.parametrize("way", (*WAYS, *FURTHER), ids=lambda way: way.name)
def test_a_way_with_every_row_is_exact_attention(store, way: Way):
    rng = np.random.default_rng(1)
    q = rng.normal(size=(4, 1, DIM)).astype(np.float32)
    index = way.index(store, rng.normal(size=(4, 256, DIM)).astype(np.float32))
    result = la.retrieval_attention(q, store, index, window=64, **way.budget(2 * ROWS))  # samples read half of it
    if way.kind != "lsh":  # which samples, whatever the budget
        np.testing.assert_allclose(result.out, la.attention(q, store.keys, store.values), atol=2e-5)
    few = la.retrieval_attention(q, store, index, window=64, **way.budget(100))
    assert few.stats is not None
    if way.epsilon is not None:  # of so few rows no sample promises anything
        assert not few.stats.verified.any() and (few.stats.keys_attended == ROWS).all()
        return
    assert (few.stats.keys_attended <= 4 + 64 + 100 + 16).all()
    assert (few.stats.keys_total == ROWS).all()


def test_features_take_their_weights_by_name(store):
    weights = np.random.default_rng(2).normal(size=(DIM, 64)).astype(np.float32)
    assert by_name.needed("features") == ["w_enc"]
    index = la.index.make("features", store, w_enc=weights, top_k=8)
    assert isinstance(index, la.index.Features) and index.parameters["top_k"] == 8
    q = np.random.default_rng(3).normal(size=(4, 1, DIM)).astype(np.float32)
    direct = la.index.Features(store, weights, top_k=8)
    rows = [
        la.retrieval_attention(q, store, one, top_k=50, rest="none", return_selected=True).stats.selected[0][0]
        for one in (index, direct)
    ]
    np.testing.assert_array_equal(*rows)
    with pytest.raises(TypeError, match="w_enc: got none, expected the parameter that an index of features needs"):
        la.index.make("features", store)


def test_unknown_names_are_refused(store):
    with pytest.raises(ValueError, match="kind: got 'nothing', expected 'signatures', "):
        la.index.make("nothing", store)
    with pytest.raises(TypeError, match="page: no parameter of an index of signatures, which has bits"):
        la.index.make("signatures", store, page=3)
    with pytest.raises(ValueError, match="ways: got 'nothing'"):
        chosen("nothing")
    assert chosen("all") == WAYS
    assert [way.name for way in chosen("2 bits,1 bit")] == ["signatures, 2 bits", "signatures, 1 bit"]


def test_queries_go_to_those_that_learn():
    assert not by_name.learns_from_queries("signatures")
    assert by_name.learns_from_queries("graph")
