"""Indexes in files: what is loaded is what was saved, and only onto the store it was made of."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest

import longattn as la


def _store(rows: int, seed: int = 0) -> la.KVStore:
    rng = np.random.default_rng(seed)
    store = la.KVStore(kv_heads=2, head_dim=24, value_dim=20, capacity=8192)
    k, v = rng.normal(size=(2, rows, 24)), rng.normal(size=(2, rows, 20))
    store.append(k.astype(ml_dtypes.bfloat16), v.astype(ml_dtypes.bfloat16))
    return store


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_loaded_index_answers_as_the_saved_one(tmp_path, bits):
    store = _store(3000)
    index = la.index.Signatures(store, bits, seed=3)
    index.update()
    index.save(tmp_path / "index")
    again = la.index.Signatures.load(tmp_path / "index", store)
    assert again.parameters == index.parameters
    assert (len(again), again.nbytes) == (len(index), index.nbytes)
    # Both grow on.
    extra = _store(700, seed=5)
    store.append(extra.keys, extra.values)
    q = np.random.default_rng(2).normal(size=(4, 1, 24)).astype(np.float32)
    results = [la.retrieval_attention(q, store, i, top_k=50, window=64) for i in (index, again)]
    np.testing.assert_array_equal(results[0].out, results[1].out)
    np.testing.assert_array_equal(results[0].lse, results[1].lse)


@pytest.mark.parametrize("kind", sorted(set(la.index.KINDS) - {"features"}))
def test_a_deep_copy_is_of_a_store_of_its_own(kind):
    store = _store(1000)
    index = la.index.make(kind, store)
    index.update()
    again = copy.deepcopy({"store": store, "index": index})
    assert again["index"].store is again["store"] is not store
    assert (len(again["index"]), again["index"].parameters) == (len(index), index.parameters)
    store.truncate(10)
    assert len(again["store"]) == 1000


def test_an_index_of_few_rows_is_saved_too(tmp_path):
    store = _store(100)
    la.index.Signatures(store).save(tmp_path / "index")
    assert len(la.index.Signatures.load(tmp_path / "index", store)) == 0


def test_it_is_loaded_onto_its_rows_alone(tmp_path):
    store = _store(1024)
    index = la.index.Signatures(store)
    index.update()
    index.save(tmp_path / "index")
    store.save(tmp_path / "store")
    again = la.index.Signatures.load(tmp_path / "index", la.KVStore.load(tmp_path / "store"))
    assert len(again) == 1024
    for other in (_store(1024, seed=9), _store(900)):
        with pytest.raises(ValueError, match="this store's first rows"):
            la.index.Signatures.load(tmp_path / "index", other)
    with pytest.raises(TypeError, match="store: got str"):
        la.index.Signatures.load(tmp_path / "index", "store")  # type: ignore[arg-type]


def test_damaged_files_are_refused(tmp_path):
    store = _store(1024)
    index = la.index.Signatures(store)
    index.update()
    path = tmp_path / "index"
    index.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [0, 9, 60, *rng.integers(8, len(whole), 40).tolist(), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="index"):
            la.index.Signatures.load(path, store)
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut off"):
            la.index.Signatures.load(path, store)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="too long"):
        la.index.Signatures.load(path, store)
    store.save(path)
    with pytest.raises(ValueError, match=r"not a longattn\.index file"):
        la.index.Signatures.load(path, store)
    with pytest.raises(FileNotFoundError):
        la.index.Signatures.load(tmp_path / "none", store)


def test_a_truncated_store_is_followed_before_it_is_saved(tmp_path):
    store = _store(1024)
    index = la.index.Signatures(store)
    index.update()
    store.truncate(600)
    with pytest.raises(ValueError, match="update it first"):
        index.save(tmp_path / "index")
    index.update()
    index.save(tmp_path / "index")
    assert len(la.index.Signatures.load(tmp_path / "index", store)) == 592


def test_files_of_another_version_are_refused(tmp_path):
    store = _store(1024)
    path = tmp_path / "index"
    index = la.index.Clusters(store, 512)
    index.update()
    index.save(path)
    whole = path.read_bytes()
    for version in (b"2", b"4"):
        path.write_bytes(whole.replace(b'"version":"3"', b'"version":"' + version + b'"', 1))
        with pytest.raises(ValueError, match=f"index of version .{version.decode()}., expected .3.: make it anew"):
            la.index.Clusters.load(path, store)
    path.write_bytes(whole.replace(b'"longattn.index"', b'"longattn.other"', 1))
    with pytest.raises(ValueError, match=r"not a longattn\.index file"):
        la.index.Clusters.load(path, store)
