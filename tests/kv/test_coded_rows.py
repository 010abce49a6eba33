"""`CodedRows`: what a store of codes gives as keys and values, and who takes it."""

import gc
import threading

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.kv import CodedRows, KVStore
from longattn.reference import dense as reference
from random_arrays import normal
from random_stores import rows, store_of

DTYPES = ["int8", "int4"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_they_tell(rng, dtype):
    store = store_of(*rows(rng, 2, 9, 40, 33), dtype)
    assert store.dtype == dtype and repr(store).startswith("KVStore(kv_heads=2, head_dim=40, value_dim=33")
    for part, dim in ((store.keys, 40), (store.values, 33)):
        assert isinstance(part, CodedRows)
        assert (part.shape, part.ndim, part.dtype) == ((2, 9, dim), 3, dtype)
        assert part.nbytes == 2 * 9 * (64 * (8 if dtype == "int8" else 4) // 8 + 8)
        assert repr(part) == f"CodedRows(shape=(2, 9, {dim}), dtype='{dtype}')"
    empty = KVStore(4, 8, 3, dtype)
    assert (empty.keys.shape, empty.values.shape, empty.keys.nbytes) == ((4, 0, 8), (4, 0, 3), 0)
    assert np.asarray(empty.values).shape == (4, 0, 3)


def test_numpy_decodes_a_copy(rng):
    keys = store_of(*rows(rng, 2, 9, 40), "int8").keys
    array = np.asarray(keys)
    assert array.dtype == np.float32 and array.shape == (2, 9, 40) and array.flags.writeable
    array[:] = 0
    assert np.asarray(keys).any(), "the store is not written"
    for wide in (np.asarray(keys, np.float64), np.array(keys, dtype=np.float64, copy=True)):
        np.testing.assert_array_equal(wide, np.asarray(keys).astype(np.float64))
        assert wide.dtype == np.float64
    with pytest.raises(ValueError, match="copy: got False, expected a copy: the numbers are decoded"):
        np.asarray(keys, copy=False)
    with pytest.raises(ValueError, match="copy: got False"):
        np.array(keys, copy=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_the_rows_that_were_there(rng, dtype):
    store = store_of(*rows(rng, 2, 9, 40), dtype)
    q, keys, values = normal(rng, (4, 1, 40)), store.keys, store.values
    before, out = np.asarray(keys), la.attention(q, keys, values)
    for _ in range(30):
        store.append(normal(rng, (2, 100, 40)), normal(rng, (2, 100, 40)))
    assert keys.shape == (2, 9, 40) and store.keys.shape == (2, 3009, 40)
    np.testing.assert_array_equal(np.asarray(keys), before)
    np.testing.assert_array_equal(la.attention(q, keys, values), out)
    # A truncate above them changes nothing.
    store.truncate(9)
    np.testing.assert_array_equal(np.asarray(keys), before)
    np.testing.assert_array_equal(la.attention(q, keys, values), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_keep_the_store_alive(rng, dtype):
    store = store_of(*rows(rng, 2, 50, 40), dtype, channel_scales=True)
    q, keys, values = normal(rng, (4, 2, 40)), store.keys, store.values
    before, out = np.asarray(keys), la.attention(q, keys, values)
    del store
    gc.collect()
    others = [store_of(*rows(rng, 2, 50, 40), dtype) for _ in range(5)]
    np.testing.assert_array_equal(np.asarray(keys), before)
    np.testing.assert_array_equal(la.attention(q, keys, values), out)
    assert len(others) == 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_were_dropped_are_refused(rng, dtype):
    store = store_of(*rows(rng, 2, 9, 40), dtype)
    q, keys, values = normal(rng, (4, 1, 40)), store.keys, store.values
    store.truncate(8)
    message = "store: got 8 rows, expected the 9 that were there"
    with pytest.raises(ValueError, match=message):
        la.attention(q, keys, values)
    with pytest.raises(ValueError, match=message):
        np.asarray(keys)
    assert la.attention(q, store.keys, store.values).shape == (4, 1, 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_were_replaced_are_refused(rng, dtype):
    """Other rows in their place do not bring dropped rows back."""
    k, v = rows(rng, 2, 9, 40)
    store = store_of(k, v, dtype)
    kept, (keys, values) = (store.keys, store.values), (store.keys, store.values)
    store.truncate(8)
    store.append(k, v)
    for part in (keys, values):
        with pytest.raises(ValueError, match="the 9 that were there"):
            np.asarray(part)
    with pytest.raises(ValueError, match="the 9 that were there"):
        la.attention(normal(rng, (4, 1, 40)), *kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_of_numbers_refuse_them_by_name(rng, dtype):
    store = store_of(*rows(rng, 2, 9, 8), dtype)
    codes, x, lengths = store.keys, normal(rng, (2, 9, 8)), np.array([0, 2])
    lse = np.zeros((2, 9), np.float32)
    calls = {
        "q": lambda: la.attention(codes, codes, codes),
        "bias": lambda: la.attention(x, codes, codes, bias=codes),
        "mask": lambda: la.attention(x, codes, codes, mask=codes),
        "sinks": lambda: la.attention(x, codes, codes, sinks=codes),
        "out": lambda: la.attention(x, codes, codes, out=codes),
        "k": lambda: la.attention_varlen(x, codes, codes, lengths, lengths),
        "v": lambda: la.attention_varlen(x, x, codes, lengths, lengths),
        r"parts\[0\] o": lambda: la.merge([(codes, lse)]),
        r"parts\[0\] lse": lambda: la.merge([(x, codes)]),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name}: "):
            call()
    for other in (store, KVStore(2, 8, dtype="float32", capacity=20)):
        with pytest.raises(TypeError, match=r"^k: got CodedRows.*, expected numbers"):
            other.append(codes, codes)
        with pytest.raises(TypeError, match=r"^v: got CodedRows.*, expected numbers"):
            other.append(x, codes)
    with pytest.raises(TypeError, match=rf"^store: got dtype {dtype}, expected float32, float16 or bfloat16"):
        la.index.Flat(store)


def test_what_attention_asks_of_them(rng):
    keys, values = rows(rng, 2, 9, 8)
    store, other = store_of(keys, values, "int8"), store_of(keys, values, "int4")
    k, v, q = store.keys, store.values, normal(rng, (4, 3, 8))
    cases = [
        (TypeError, "v: got dtype float32, expected int8 as k", (q, k, values)),
        (TypeError, "v: got dtype int8, expected float32 as k", (q, keys, v)),
        (TypeError, "v: got dtype int4, expected int8 as k", (q, k, other.values)),
        (ValueError, r"k: got shape \(2, 9, 8\), expected rank 4 as q", (q[None], k, v)),
        (ValueError, "k: got head_dim 8, expected 5 as in q", (q[..., :5], k, v)),
        (ValueError, "q: got 3 heads, expected a positive multiple of the 2", (q[:3], k, v)),
    ]
    store.append(keys, values)
    cases.append((ValueError, "v: got length 18, expected 9 as in k", (q, k, store.values)))
    for error, match, arguments in cases:
        with pytest.raises(error, match=rf"^{match}"):
            la.attention(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_while_another_thread_appends(dtype):
    """Row `n` is the constant `n`, which codes hold exactly, and all weigh the same."""
    store, total = KVStore(2, 8, 40, dtype, 6000), 6000

    def write():
        for start in range(0, total, 30):
            numbers = np.arange(start, start + 30, dtype=np.float32)[None, :, None]
            store.append(np.zeros((2, 30, 8), np.float32), np.broadcast_to(numbers, (2, 30, 40)))

    q, attended = np.ones((4, 1, 8), np.float32), []
    writer = threading.Thread(target=write)
    writer.start()
    while not attended or attended[-1] < total:
        keys, values = store.keys, store.values
        n = keys.shape[1]
        if n == 0 or values.shape[1] != n:  # an append came between the two
            continue
        v = np.broadcast_to(np.arange(n, dtype=np.float32)[None, :, None], (2, n, 40))
        out = la.attention(q, keys, values)
        tolerances.coded_attention(q, np.zeros((2, n, 8)), v).check(out, np.full(out.shape, (n - 1) / 2))
        attended.append(n)
    writer.join()
    assert attended == sorted(attended)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_while_another_thread_truncates(dtype):
    """A call sees all of its rows or is refused; never rows that are being replaced."""
    store, done = KVStore(2, 8, 40, dtype, 400), threading.Event()
    numbers = np.broadcast_to(np.arange(400, dtype=np.float32)[None, :, None], (2, 400, 40))
    zeros = np.zeros((2, 400, 8), np.float32)
    store.append(zeros, numbers)

    def rewrite():
        for low in (390, 100, 0) * 60:
            store.truncate(low)
            store.append(zeros[:, low:], numbers[:, low:])
        done.set()

    q = np.ones((4, 1, 8), np.float32)
    writer = threading.Thread(target=rewrite)
    writer.start()
    while not done.is_set():
        keys, values = store.keys, store.values
        n = keys.shape[1]
        if n == 0 or values.shape[1] != n:
            continue
        try:
            out = la.attention(q, keys, values)
        except ValueError as error:
            assert "that were there" in str(error)
        else:
            tolerance = tolerances.coded_attention(q, zeros[:, :n], numbers[:, :n])
            tolerance.check(out, np.full(out.shape, (n - 1) / 2))
    writer.join()
    out = la.attention(q, store.keys, store.values)
    tolerances.coded_attention(q, zeros, numbers).check(out, reference.attention(q, zeros, numbers))
