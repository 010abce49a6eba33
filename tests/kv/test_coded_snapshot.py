"""Stores of codes in files: what was saved comes back, and nothing else is taken for it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longattn as la
from longattn.kv import KVStore
from random_arrays import normal

DTYPES = ["int8", "int4"]


def saved(path, count, dtype, *, dim=40, value_dim=3, **options):
    rng = np.random.default_rng(count)
    store = KVStore(2, dim, value_dim, dtype, 20, **options)
    store.append(normal(rng, (2, count, dim)), normal(rng, (2, count, value_dim)))
    store.save(path)
    return store


def same(a, b):
    if (a.channel_scales is None) != (b.channel_scales is None) or len(a) != len(b) or a.dtype != b.dtype:
        return False
    pairs = [(np.asarray(a.keys), np.asarray(b.keys)), (np.asarray(a.values), np.asarray(b.values))]
    if a.channel_scales is not None:
        pairs.append((a.channel_scales, b.channel_scales))
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(
    count=st.integers(0, 20),
    capacity=st.none() | st.integers(20, 1000),
    group_size=st.sampled_from([None, 32, 64]),
    channel_scales=st.booleans(),
    dim=st.sampled_from([1, 40, 100]),
)
def test_round_trip(tmp_path_factory, dtype, count, capacity, group_size, channel_scales, dim):
    path = tmp_path_factory.mktemp("kv") / "store"
    store = saved(path, count, dtype, dim=dim, group_size=group_size, channel_scales=channel_scales)
    loaded = KVStore.load(path, capacity)
    assert same(store, loaded) and loaded.capacity == (capacity or 20)
    assert (loaded.kv_heads, loaded.head_dim, loaded.value_dim, loaded.dtype) == (2, dim, 3, dtype)
    assert loaded.keys.nbytes == store.keys.nbytes
    if count:
        q = np.ones((4, 2, dim), np.float32)
        out = la.attention(q, loaded.keys, loaded.values)
        np.testing.assert_array_equal(out, la.attention(q, store.keys, store.values))
    # Both go on alike: the first rows still set the factors of a store that was saved empty.
    rng = np.random.default_rng(1)
    k, v = normal(rng, (2, 20 - count, dim), spread=3.0), normal(rng, (2, 20 - count, 3))
    for s in (store, loaded, loaded.fork()):
        s.append(k, v)
        assert same(s, store)
    assert (store.channel_scales is not None) == channel_scales


def test_the_file_is_a_safetensors_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "store"
    store = saved(path, 5, "int4", group_size=32, channel_scales=True)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    # 64 codes of 4 bits and two groups; 32 codes and one.
    assert header["keys"] == {"dtype": "U8", "shape": [2, 5, 48], "data_offsets": [0, 480]}
    assert header["values"] == {"dtype": "U8", "shape": [2, 5, 24], "data_offsets": [480, 720]}
    assert header["key_channels"] == {"dtype": "F32", "shape": [2, 40], "data_offsets": [720, 1040]}
    assert header["__metadata__"]["codes"] == "4 32 40 3"
    np.testing.assert_array_equal(safetensors.load_file(path)["key_channels"], store.channel_scales)


CASES = [("int8", 0, True), ("int8", 2, False), ("int4", 0, False), ("int4", 2, True)]


@pytest.mark.parametrize(("dtype", "count", "channel_scales"), CASES)
def test_every_altered_byte_is_refused(tmp_path, dtype, count, channel_scales):
    path = tmp_path / "store"
    saved(path, count, dtype, dim=5, channel_scales=channel_scales)
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ (0x01 if i % 3 else 0x20)]) + data[i + 1 :])
        with pytest.raises(ValueError, match="store: "):
            KVStore.load(path)
    path.write_bytes(data)
    KVStore.load(path)


@pytest.mark.parametrize(("dtype", "count", "channel_scales"), CASES)
def test_every_cut_is_refused(tmp_path, dtype, count, channel_scales):
    path = tmp_path / "store"
    saved(path, count, dtype, dim=5, channel_scales=channel_scales)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut off"):
            KVStore.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="too long"):
        KVStore.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"codes":"8 32 40 3"', '"codes":"4 32 40 3"'),
        ('"codes":"8 32 40 3"', '"codes":"3 32 40 3"'),
        ('"codes":"8 32 40 3"', '"codes":"8 48 40 3"'),
        ('"codes":"8 32 40 3"', '"codes":"8 0 40 3"'),
        ('"codes":"8 32 40 3"', '"codes":"8 32 400 3"'),
        ('"codes":"8 32 40 3"', '"codes":"8 32 0 3"'),
        ('"codes":"8 32 40 3"', '"codes":"8 32 -40 3"'),
        ('"codes":"8 32 40 3"', '"codes":"8 32 40"'),
        ('"codes":"8 32 40 3"', '"codes":"8 32 40 3 1"'),
        ('"codes":"8 32 40 3"', '"codes":[8, 32, 40, 3]'),
        ('"codes":"8 32 40 3"', '"codes":"8 32 18446744073709551615 3"'),
        ('"codes":"8 32 40 3"', '"codes":"8 32 9223372036854775807 3"'),
        ('"codes":"8 32 40 3"', '"codes":"8 18446744073709551615 40 3"'),
        ('"codes":"8 32 40 3"', '"codes":"18446744073709551615 32 40 3"'),
        (',"codes":"8 32 40 3"', ""),
        (',"channels":"off"', ""),
        ('"channels":"off"', '"channels":"awaited"'),
        ('"channels":"off"', '"channels":"stored"'),
        ('"channels":"off"', '"channels":true'),
        ('"U8"', '"I8"'),
        ('"U8"', '"BF16"'),
        ("[2,3,80]", "[2,3,81]"),
        ("[2,3,80]", "[2,3]"),
        ("[2,3,80]", "[2,18446744073709551615,80]"),
    ],
)
def test_headers_that_say_something_else_are_refused(tmp_path, old, new):
    path = tmp_path / "store"
    saved(path, 3, "int8", group_size=32)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode()
    assert old in text
    header = text.rstrip().replace(old, new).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(ValueError, match="store: "):
        KVStore.load(path)


def test_fewer_rows_than_the_file_has_do_not_fit(tmp_path):
    saved(tmp_path / "store", 5, "int4")
    with pytest.raises(ValueError, match="capacity: got 4, expected at least the 5 rows"):
        KVStore.load(tmp_path / "store", capacity=4)
    assert KVStore.load(tmp_path / "store", capacity=5).capacity == 5
