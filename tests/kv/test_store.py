"""`KVStore`: rows in, the same rows out, at addresses that never change."""

import copy
import gc
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import longattn as la
from longattn.kv import KVStore
from resident import resident

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
STEP = 2 << 20


def store_with(rng, rows, *, kv_heads=2, head_dim=8, value_dim=6, dtype="float32", capacity=200):
    store = KVStore(kv_heads, head_dim, value_dim, dtype, capacity)
    k = rng.standard_normal((kv_heads, rows, head_dim)).astype(dtype)
    v = rng.standard_normal((kv_heads, rows, value_dim)).astype(dtype)
    store.append(k, v)
    return store, k, v


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    nan = np.isnan(a)
    np.testing.assert_array_equal(nan, np.isnan(b))
    bits = f"u{a.itemsize}"
    np.testing.assert_array_equal(a.copy().view(bits)[~nan], b.copy().view(bits)[~nan])


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25)
@given(data=st.data(), chunks=st.lists(st.integers(0, 9), max_size=5))
def test_chunks_come_back_converted_as_numpy_converts(data, chunks, source, dtype):
    rows = sum(chunks)
    floats = st.floats(width=32).map(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        k = data.draw(hnp.arrays(np.float32, (2, rows, 3), elements=floats)).astype(source)
        v = -k[..., :2]
        expected = k.astype(np.float32).astype(dtype), v.astype(np.float32).astype(dtype)
    store = KVStore(2, 3, 2, dtype, capacity=50)
    start = 0
    for count in chunks:
        assert store.append(k[:, start : start + count], v[None, :, start : start + count]) is None
        start += count
        assert len(store) == start
    assert_same_bits(store.keys, expected[0])
    assert_same_bits(store.values, expected[1])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=20))
def test_appends_and_truncates_follow_a_list(ops):
    store, model = KVStore(2, 4, 4, "float32", capacity=100), []
    for number, (grow, n) in enumerate(ops):
        if grow:
            rows = np.full((2, n, 4), number, np.float32)
            if len(model) + n > 100:
                with pytest.raises(ValueError, match="capacity of 100"):
                    store.append(rows, rows)
            else:
                store.append(rows, rows)
                model += [number] * n
        else:
            store.truncate(n)
            del model[n:]
        assert len(store) == len(model)
        np.testing.assert_array_equal(store.keys, np.tile(np.float32(model)[None, :, None], (2, 1, 4)))
    store.clear()
    assert len(store) == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda x: np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1),
        lambda x: np.repeat(x, 3, axis=1)[:, ::3],
        lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
        lambda x: np.ascontiguousarray(x[::-1])[::-1],
        lambda x: np.concatenate([x, x], axis=-1)[..., : x.shape[-1]],
        np.asfortranarray,
    ],
    ids=["tokens first", "every third row", "rows reversed", "heads reversed", "part of a row", "fortran"],
)
def test_strides(rng, view):
    k = rng.standard_normal((3, 7, 5)).astype(np.float32)
    for dtype in DTYPES:
        store = KVStore(3, 5, dtype=dtype, capacity=7)
        store.append(view(k), view(k + 1))
        np.testing.assert_array_equal(store.keys, k.astype(dtype))
        np.testing.assert_array_equal(store.values, (k + 1).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_borrow_the_store(rng, dtype):
    store, k, _ = store_with(rng, 3, dtype=dtype)
    keys = store.keys
    assert keys.dtype == dtype and keys.shape == (2, 3, 8) and not keys.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        keys[0, 0, 0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        keys.flags.writeable = True
    address = keys.ctypes.data
    for _ in range(100):
        store.append(k[:, :1], np.zeros((2, 1, 6), dtype))
    assert store.keys.ctypes.data == address and np.shares_memory(keys, store.keys)
    np.testing.assert_array_equal(keys, k)
    del store
    gc.collect()
    np.testing.assert_array_equal(keys, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_store_has_empty_arrays(dtype):
    store = KVStore(kv_heads=4, head_dim=8, value_dim=3, dtype=dtype)
    assert (len(store), store.nbytes, store.capacity) == (0, 0, 1 << 20)
    assert (store.keys.shape, store.values.shape) == ((4, 0, 8), (4, 0, 3))
    assert store.keys.dtype == store.values.dtype == store.dtype == dtype
    store.append(store.keys, store.values)
    store.truncate(5)
    assert len(store) == len(store.fork()) == 0


def test_fork_shares_nothing(rng):
    store, k, v = store_with(rng, 30)
    fork = store.fork()
    store.truncate(10)
    store.append(k[:, :5], v[:, :5])
    np.testing.assert_array_equal(fork.keys, k)
    np.testing.assert_array_equal(fork.values, v)
    fork.append(k, v)
    assert (len(store), len(fork), fork.capacity) == (15, 60, 200)


def test_a_store_can_append_its_own_rows(rng):
    store, k, v = store_with(rng, 30)
    store.append(store.keys, store.values)
    np.testing.assert_array_equal(store.keys, np.concatenate([k, k], axis=1))
    dropped = store.keys, store.values
    store.truncate(20)
    with pytest.raises(ValueError, match=r"^k: .*truncated"):
        store.append(*dropped)
    with pytest.raises(ValueError, match=r"^v: .*truncated"):
        store.append(k[:, :30], dropped[1][:, :30])
    store.append(dropped[0][:, :20], dropped[1][:, :20])
    np.testing.assert_array_equal(store.values, np.concatenate([v[:, :20]] * 2, axis=1))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"kv_heads": 0}, ValueError, "kv_heads: got 0"),
        ({"head_dim": 0}, ValueError, "head_dim: got 0"),
        ({"value_dim": -3}, ValueError, "value_dim: got -3"),
        ({"capacity": 0}, ValueError, "capacity: got 0"),
        ({"capacity": 1 << 70}, ValueError, "capacity: got 1180591620717411303424"),
        ({"capacity": 1 << 62}, ValueError, "capacity: got 4611686018427387904 rows"),
        ({"capacity": 1 << 55}, MemoryError, "keys"),
        ({"capacity": 10.0}, TypeError, "capacity: got 10.0, expected an integer"),
        ({"kv_heads": "2"}, TypeError, "kv_heads: got '2'"),
        ({"dtype": "float64"}, TypeError, "dtype: got 'float64', expected float32, float16, bfloat16"),
        ({"dtype": ">f4"}, TypeError, "dtype: got '>f4'"),
        ({"dtype": "no dtype"}, TypeError, "dtype: got 'no dtype'"),
    ],
)
def test_bad_sizes(arguments, error, match):
    with pytest.raises(error, match=match):
        KVStore(**{"kv_heads": 2, "head_dim": 8, "capacity": 10} | arguments)


@pytest.mark.parametrize(
    ("k", "v", "error", "match"),
    [
        ((3, 2, 8), (2, 2, 6), ValueError, r"k: got shape \[1, 3, 2, 8\], expected \[1, 2, T, 8\]"),
        ((2, 2, 9), (2, 2, 6), ValueError, r"k: got shape"),
        ((2, 2, 8), (2, 2, 8), ValueError, r"v: got shape \[1, 2, 2, 8\], expected \[1, 2, T, 6\]"),
        ((2, 2, 8), (2, 3, 6), ValueError, "v: got 3 rows, expected as many as k has, 2"),
        ((2, 2, 2, 8), (1, 2, 2, 6), ValueError, r"k: got shape \[2, 2, 2, 8\]"),
        ((0, 2, 2, 8), (1, 2, 2, 6), ValueError, r"k: got shape \[0, 2, 2, 8\]"),
        ((2, 8), (2, 2, 6), ValueError, "k: got shape"),
        ((1, 1, 2, 2, 8), (2, 2, 6), ValueError, "k: got shape"),
        ((2, 197, 8), (2, 197, 6), ValueError, "197 rows on top of 4, .* the capacity of 200"),
    ],
)
def test_bad_rows_change_nothing(rng, k, v, error, match):
    store, keys, values = store_with(rng, 4)
    nbytes = store.nbytes
    with pytest.raises(error, match=match):
        store.append(np.ones(k, np.float32), np.ones(v, np.float32))
    assert store.nbytes == nbytes
    np.testing.assert_array_equal(store.keys, keys)
    np.testing.assert_array_equal(store.values, values)


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("bad", [np.float64, np.int16, np.uint16, ">f4", "list", None], ids=str)
def test_bad_kinds_name_the_argument(rng, name, bad):
    store, k, v = store_with(rng, 4)
    rows = {"k": k, "v": v}
    rows[name] = None if bad is None else rows[name].tolist() if bad == "list" else rows[name].astype(bad)
    with pytest.raises(TypeError, match=rf"^{name}: "):
        store.append(**rows)
    assert len(store) == 4


@pytest.mark.parametrize(("length", "error"), [(-1, ValueError), (1.5, TypeError), (1 << 64, ValueError)])
def test_bad_truncate(rng, length, error):
    store, *_ = store_with(rng, 4)
    with pytest.raises(error, match=r"^length: "):
        store.truncate(length)
    assert len(store) == 4


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_copy_has_rows_of_its_own(rng, copied, dtype):
    store = KVStore(2, 32, dtype=dtype, capacity=9)
    rows = rng.standard_normal((2, 4, 32)).astype(np.float32)
    store.append(rows, rows)
    other = copied(store)
    other.truncate(2)
    other.append(-rows, -rows)
    assert (len(store), len(other)) == (4, 6)
    np.testing.assert_allclose(np.asarray(store.keys), rows, atol=0.05)


@pytest.mark.parametrize("name", ["kv_heads", "head_dim", "capacity"])
def test_a_flag_is_no_size(name):
    with pytest.raises(TypeError, match=rf"^{name}: got True, expected an integer"):
        KVStore(**{"kv_heads": 1, "head_dim": 8, name: True})


def test_torch_rows(rng):
    torch = pytest.importorskip("torch")
    k = torch.from_numpy(rng.standard_normal((1, 5, 2, 8)).astype(np.float32))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        store = KVStore(2, 8, capacity=5, dtype=str(dtype).removeprefix("torch."))
        store.append(k.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2))
        expected = k.to(dtype).float().numpy()[0].swapaxes(0, 1)
        np.testing.assert_array_equal(store.keys.astype(np.float32), expected)
    with pytest.raises(ValueError, match=r"^v: .*meta"):
        store.append(k.transpose(1, 2), k.to("meta"))


def test_attention_reads_the_store(rng):
    store, k, v = store_with(rng, 50, dtype="float16")
    q = rng.standard_normal((4, 3, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        la.attention(q, store.keys, store.values, causal=True), la.attention(q, k, v, causal=True)
    )


def test_readers_see_whole_rows_while_another_thread_appends():
    store = KVStore(3, 16, dtype="float32", capacity=20_000)

    def write():
        start = 0
        while start < 20_000:
            count = min(1 + start % 97, 20_000 - start)
            rows = np.arange(start, start + count, dtype=np.float32)
            rows = np.broadcast_to(rows[None, :, None], (3, count, 16))
            store.append(rows, -rows)
            start += count

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while writer.is_alive() or seen < 20_000:
        keys, values = store.keys, store.values
        assert keys.shape[1] >= seen
        seen = keys.shape[1]
        expected = np.broadcast_to(np.arange(seen, dtype=np.float32)[None, :, None], keys.shape)
        np.testing.assert_array_equal(keys, expected)
        np.testing.assert_array_equal(values[:, :seen], -expected)
    writer.join()


def test_threads_append_in_turns():
    store = KVStore(2, 4, dtype="bfloat16", capacity=4000)

    def write(number):
        rows = np.full((2, 10, 4), number, BF16)
        for _ in range(100):
            store.append(rows, rows)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blocks = store.keys.astype(np.int64).reshape(2, 400, 10, 4)
    assert (blocks == blocks[:1, :, :1, :1]).all()
    np.testing.assert_array_equal(np.bincount(blocks[0, :, 0, 0]), [100] * 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_tokens_stay_within_memory_computed_beforehand():
    heads, dim, rows, chunk = 2, 32, 1_000_000, 50_000
    planned = 2 * heads * -(-rows * dim * 2 // STEP) * STEP
    k = np.ones((heads, chunk, dim), BF16)
    gc.collect()
    before = resident()
    store = KVStore(heads, dim, dtype="bfloat16", capacity=1 << 24)
    for _ in range(rows // chunk):
        store.append(k, k)
    assert store.nbytes == planned
    # Beside the store itself there is only what Python and the thread pool need.
    assert planned * 0.95 < resident() - before < planned + (32 << 20)
    store.truncate(1000)
    assert store.nbytes == 2 * heads * 2 * STEP
    assert resident() - before < store.nbytes + (32 << 20)
    store.append(k[:, :10], k[:, :10])
    assert (store.values == 1).all()
    del store
    gc.collect()
    assert resident() - before < 32 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA")
def test_memory_that_the_system_refuses_is_a_memory_error():
    code = """
import resource
import numpy as np
from longattn.kv import KVStore
store = KVStore(1, 64, dtype="float32", capacity=1 << 20)
k = np.ones((1, 1000, 64), np.float32)
large = np.broadcast_to(k[:, :1], (1, 1 << 20, 64))
store.append(k, k)
nbytes = store.nbytes
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:"))
resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + (64 << 20),) * 2)
try:
    store.append(large[:, 1000:], large[:, 1000:])
except MemoryError as error:
    assert "of a store" in str(error), error
    assert (len(store), store.nbytes, (store.keys == 1).all()) == (1000, nbytes, True)
    store.append(k, k)
    print("refused", len(store))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused 2000\n"
