"""Several sequences in one call: what a call for each gives."""

from __future__ import annotations

import numpy as np
import pytest

import longattn as la

HEADS, KV_HEADS, DIM = 8, 2, 32


def _sequences(lengths, kinds=("signatures", "pages", "flat")):
    rng = np.random.default_rng(0)
    stores, indexes = [], []
    for i, length in enumerate(lengths):
        store = la.KVStore(kv_heads=KV_HEADS, head_dim=DIM, value_dim=24, capacity=8192)
        keys, values = rng.normal(size=(KV_HEADS, length, DIM)), rng.normal(size=(KV_HEADS, length, 24))
        store.append(keys.astype(np.float32), values.astype(np.float32))
        stores.append(store)
        indexes.append(la.index.make(kinds[i % len(kinds)], store))
    q = rng.normal(size=(len(lengths), HEADS, 1, DIM)).astype(np.float32)
    return q, stores, indexes


@pytest.mark.parametrize("lengths", [(1,), (3000,), (700, 5000, 64), (600,) * 9], ids=str)
@pytest.mark.parametrize("options", [{"top_k": 40}, {}, {"top_k": 5000}], ids=str)
def test_a_batch_is_a_call_for_each(isa, threads, lengths, options):
    q, stores, indexes = _sequences(lengths)
    together = la.retrieval_attention_batch(q, stores, indexes, window=32, return_selected=True, **options)
    assert len(together) == len(lengths)
    for i, found in enumerate(together):
        alone = la.retrieval_attention(q[i], stores[i], indexes[i], window=32, return_selected=True, **options)
        np.testing.assert_array_equal(found.out, alone.out)
        np.testing.assert_array_equal(found.lse, alone.lse)
        np.testing.assert_array_equal(found.stats.keys_attended, alone.stats.keys_attended)
        np.testing.assert_array_equal(found.stats.missed_mass, alone.stats.missed_mass)
        for mine, other in zip(found.stats.selected, alone.stats.selected, strict=True):
            np.testing.assert_array_equal(mine[0], other[0])


def test_sequences_may_have_different_numbers_of_queries():
    q, stores, indexes = _sequences((800, 900))
    few, many = q[0], np.repeat(q[1], 3, axis=1)
    together = la.retrieval_attention_batch([few, many], stores, indexes, top_k=30, window=16)
    assert [found.out.shape for found in together] == [(HEADS, 1, 24), (HEADS, 3, 24)]
    alone = la.retrieval_attention(many, stores[1], indexes[1], top_k=30, window=16)
    np.testing.assert_array_equal(together[1].out, alone.out)


def test_a_sampled_batch(threads):
    q, stores, indexes = _sequences((2000, 3000), kinds=("signatures",))
    together = la.retrieval_attention_batch(q, stores, indexes, epsilon=0.2, delta=0.05)
    for i, found in enumerate(together):
        alone = la.retrieval_attention(q[i], stores[i], indexes[i], epsilon=0.2, delta=0.05)
        np.testing.assert_array_equal(found.out, alone.out)
        np.testing.assert_array_equal(found.stats.verified, alone.stats.verified)


def test_no_sequence():
    assert la.retrieval_attention_batch([], [], []) == []


def test_bad_batches():
    q, stores, indexes = _sequences((700, 800))
    with pytest.raises(TypeError, match="topk: got an option that retrieval_attention does not have"):
        la.retrieval_attention_batch(q, stores, indexes, topk=5)
    with pytest.raises(ValueError, match=r"stores, indexes: got 1 and 2 for 2 queries"):
        la.retrieval_attention_batch(q, stores[:1], indexes)
    with pytest.raises(ValueError, match="got a store twice"):
        la.retrieval_attention_batch(q, stores[:1] * 2, indexes[:1] * 2)
    with pytest.raises(ValueError, match="sequence 1: index: got the index of another store"):
        la.retrieval_attention_batch(q, stores, [indexes[0], indexes[0]])
    with pytest.raises(ValueError, match="sequence 0: top_k: got 0"):
        la.retrieval_attention_batch(q, stores, indexes, top_k=0)
    with pytest.raises(TypeError, match="no_option"):
        la.retrieval_attention_batch(q, stores, indexes, no_option=1)
    with pytest.raises(ValueError, match="qs: got heads of shapes"):
        la.retrieval_attention_batch([q[0], q[1, :4]], stores, indexes)
