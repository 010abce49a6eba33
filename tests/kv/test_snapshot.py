"""Stores in files: what was saved comes back, and nothing else is taken for it."""

import json
import os
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longattn.kv import KVStore

DTYPES = ["float32", "float16", "bfloat16"]


def saved(path, rows=5, dtype="bfloat16", capacity=20):
    rng = np.random.default_rng(rows)
    store = KVStore(2, 8, 3, dtype, capacity)
    store.append(
        rng.standard_normal((2, rows, 8)).astype(np.float32),
        rng.standard_normal((2, rows, 3)).astype(np.float32),
    )
    store.save(path)
    return store


def same(a, b):
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in [(a.keys, b.keys), (a.values, b.values)])


@given(st.sampled_from(DTYPES), st.integers(0, 20), st.none() | st.integers(20, 1000))
def test_round_trip(tmp_path_factory, dtype, rows, capacity):
    path = tmp_path_factory.mktemp("kv") / "store.safetensors"
    store = saved(path, rows, dtype)
    loaded = KVStore.load(path, capacity)
    assert same(store, loaded) and len(loaded) == rows
    assert loaded.capacity == (capacity or 20)
    assert (loaded.kv_heads, loaded.head_dim, loaded.value_dim, loaded.dtype.name) == (2, 8, 3, dtype)
    loaded.append(store.keys[:, : 20 - rows], store.values[:, : 20 - rows])


def test_the_file_is_a_safetensors_file(tmp_path):
    path = tmp_path / "store.safetensors"
    store = saved(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header["__metadata__"]["format"] == "longattn.kvstore"
    assert header["keys"] == {"dtype": "BF16", "shape": [2, 5, 8], "data_offsets": [0, 160]}
    assert header["values"] == {"dtype": "BF16", "shape": [2, 5, 3], "data_offsets": [160, 220]}
    keys = np.frombuffer(data[8 + length :][:160], ml_dtypes.bfloat16).reshape(2, 5, 8)
    np.testing.assert_array_equal(keys, store.keys)


def test_other_readers_of_safetensors_read_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "store.safetensors"
    store = saved(path, dtype="float32")
    tensors = safetensors.load_file(path)
    np.testing.assert_array_equal(tensors["keys"], store.keys)
    np.testing.assert_array_equal(tensors["values"], store.values)


@pytest.mark.parametrize("rows", [0, 2])
def test_every_altered_byte_is_refused(tmp_path, rows):
    path = tmp_path / "store"
    saved(path, rows)
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x20]) + data[i + 1 :])
        with pytest.raises(ValueError, match="store: "):
            KVStore.load(path)


def test_every_cut_is_refused(tmp_path):
    path = tmp_path / "store"
    saved(path, 2)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut off"):
            KVStore.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="too long"):
        KVStore.load(path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "cut off: 0 bytes"),
        (b"not a store at all", "a header of"),
        ((10**9).to_bytes(8, "little") + b"{}", "a header of 1000000000 bytes in a file of 10"),
        ((2).to_bytes(8, "little") + b"{]", "not JSON"),
        ((2).to_bytes(8, "little") + b"{}", "not a longattn.kvstore file"),
    ],
)
def test_foreign_files_are_refused(tmp_path, data, match):
    path = tmp_path / "store"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match):
        KVStore.load(path)


def test_bad_arguments(tmp_path):
    path = tmp_path / "store"
    store = saved(path)
    with pytest.raises(ValueError, match="capacity: got 4, expected at least the 5 rows"):
        KVStore.load(path, capacity=4)
    with pytest.raises(ValueError, match="capacity: got 0"):
        KVStore.load(path, capacity=0)
    with pytest.raises(TypeError, match="capacity"):
        KVStore.load(path, capacity=5.0)
    with pytest.raises(FileNotFoundError, match="missing"):
        KVStore.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing"):
        store.save(tmp_path / "missing" / "store")
    with pytest.raises(ValueError, match="not a regular file"):
        KVStore.load(tmp_path)
    with pytest.raises(IsADirectoryError):
        store.save(tmp_path)
    with pytest.raises(TypeError):
        store.save(3)


def test_a_path_of_bytes(tmp_path):
    path = bytes(tmp_path / "store")
    store = saved(path)
    assert same(KVStore.load(path), store)


def test_a_pipe_is_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        saved(path)
    assert path.is_fifo() and list(tmp_path.iterdir()) == [path]


def test_saving_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "store"
    for rows in (3, 7):
        store = saved(str(path), rows)
        assert same(KVStore.load(str(path)), store)
    assert list(tmp_path.iterdir()) == [path]


def test_saving_while_another_thread_appends(tmp_path):
    path = tmp_path / "store"
    store = KVStore(2, 4, dtype="float32", capacity=100_000)

    def write():
        for start in range(0, 100_000, 50):
            rows = np.broadcast_to(np.arange(start, start + 50, dtype=np.float32)[None, :, None], (2, 50, 4))
            store.append(rows, rows)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(10):
        least = len(store)
        store.save(path)
        loaded = KVStore.load(path)
        assert least <= len(loaded) <= len(store)
        np.testing.assert_array_equal(loaded.keys[1, :, 3], np.arange(len(loaded)))
    writer.join()
