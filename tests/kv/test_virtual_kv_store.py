"""`VirtualKVStore`: contiguous rows of many requests at addresses that never change, and every byte accounted for."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longattn as la
from longattn.kv import VirtualKVStore
from longattn.reference import kv as reference
from random_arrays import BF16, DTYPES, F32, normal
from resident import resident

PAGE = os.sysconf("SC_PAGESIZE")
SMALL = {"layers": 2, "kv_heads": 2, "head_dim": 16, "value_dim": 8, "dtype": F32}
LIMITS = {"max_requests": 4, "max_tokens": 300, "granule": PAGE}


def rows(rng, count, *, kv_heads=2, head_dim=16, value_dim=8, dtype=F32):
    return tuple(normal(rng, (count, kv_heads, dim), dtype) for dim in (head_dim, value_dim))


def filled(rng, store, count, layers=2, **sizes):
    """A request with random rows in every layer, and those rows."""
    r = store.alloc()
    store.ensure(r, count)
    expected = [rows(rng, count, **sizes) for _ in range(layers)]
    for layer, (k, v) in enumerate(expected):
        store.write(r, layer, 0, k, v)
    return r, expected


def address(array):
    return array.__array_interface__["data"][0]


# identity checks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granule", [PAGE, 1 << 16, 2 << 20])
def test_attention_over_a_view_has_the_bits_of_attention_over_a_copy(rng, isa, dtype, granule):
    sizes = {"kv_heads": 2, "head_dim": 40, "value_dim": 24}
    store = VirtualKVStore(2, **sizes, dtype=dtype, max_requests=3, max_tokens=1000, granule=granule)
    for count in (1, 300, 999):
        r, expected = filled(rng, store, count, dtype=dtype, **sizes)
        for layer in range(2):
            views = [x.swapaxes(0, 1) for x in store.view(r, layer)]
            for view, given_rows in zip(views, expected[layer], strict=True):
                np.testing.assert_array_equal(view, given_rows.swapaxes(0, 1))
            copies = [np.ascontiguousarray(x) for x in views]
            for n in (1, 30):
                q = normal(rng, (4, n, 40), dtype)
                np.testing.assert_array_equal(
                    la.attention(q, *views, causal=True).view(np.uint8),
                    la.attention(q, *copies, causal=True).view(np.uint8),
                )


@pytest.mark.parametrize("background", [False, True])
def test_addresses_do_not_change(rng, background):
    store = VirtualKVStore(**SMALL, **LIMITS, background=background)
    store.alloc()
    r = store.alloc()
    store.ensure(r, 1)
    first = [address(x) for layer in range(2) for x in store.view(r, layer)]
    k, v = rows(rng, 300)
    for n in (2, 40, 41, 200, 300):
        store.ensure(r, n)
        store.write(r, 1, 0, k[:n], v[:n])
        views = [x for layer in range(2) for x in store.view(r, layer)]
        assert [address(x) for x in views] == first
        assert all(x.flags.c_contiguous and len(x) == n for x in views)
    np.testing.assert_array_equal(store.view(r, 1)[0], k)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["alloc", "ensure", "write", "free", "reclaim"]), st.integers(0, 99), st.integers(0, 300)
    ),
    max_size=40,
)


@pytest.mark.parametrize("deferred", [False, True])
@settings(max_examples=60)
@given(steps=STEPS, granule=st.sampled_from([PAGE, 2 * PAGE, 2 << 20]))
def test_a_random_life_follows_the_model(steps, granule, deferred):
    sizes = SMALL | LIMITS | {"granule": granule, "deferred_reclaim": deferred}
    store, model = VirtualKVStore(**sizes), reference.VirtualKVStore(**sizes)
    written = {}
    for number, (step, choice, n) in enumerate(steps, 1):
        live = sorted(model.live)
        if step == "alloc":
            if not model.free_slots:
                with pytest.raises(ValueError, match="max_requests, 4"):
                    store.alloc()
                continue
            r = model.alloc()
            assert store.alloc() == r
            written[r] = 0
        elif step == "reclaim":
            store.reclaim()
            model.reclaim()
        elif live:
            r = live[choice % len(live)]
            if step == "ensure":
                store.ensure(r, n)
                model.ensure(r, n)
            elif step == "write":
                # Rows are written from the front, as a sequence grows.
                end = len(model.view(r, 0)[0])
                count = max(min(n, end - written[r]), 0)
                for layer in range(2):
                    k, v = (np.full((count, 2, dim), number + layer, F32) for dim in (16, 8))
                    store.write(r, layer, written[r], k, v)
                    model.write(r, layer, written[r], k, v)
                written[r] += count
            else:
                store.free(r)
                model.free(r)
        assert store.committed_bytes == model.committed_bytes
        assert (len(store), store.free_slots) == (len(model.live), len(model.free_slots))
        for r in model.live:
            # What was not written yet is zero, unless an earlier request has left something there.
            upto = written[r] if deferred else None
            for layer in range(2):
                for ours, theirs in zip(store.view(r, layer), model.view(r, layer), strict=True):
                    assert ours.shape == theirs.shape
                    np.testing.assert_array_equal(ours[:upto], theirs[:upto])


def test_a_slot_that_is_used_again_reads_as_zeros(rng):
    store = VirtualKVStore(**SMALL, **LIMITS)
    r, _ = filled(rng, store, 300)
    store.free(r)
    assert store.committed_bytes == 0
    assert store.alloc() == r
    assert store.tokens(r) == 0 and store.view(r, 0)[0].shape == (0, 2, 16)
    store.ensure(r, 300)
    for layer in range(2):
        for array in store.view(r, layer):
            assert not array.any()


# policies


def test_deferred_reclaim_hands_warm_slots_out_first(rng):
    store = VirtualKVStore(**SMALL, **LIMITS, deferred_reclaim=True)
    requests = [filled(rng, store, n)[0] for n in (10, 20, 300)]
    committed = store.committed_bytes
    for r in requests[:2]:
        store.free(r)
    assert store.committed_bytes == committed
    assert [store.alloc(), store.alloc()] == requests[1::-1]
    store.ensure(requests[1], 20)
    assert store.committed_bytes == committed
    for r in requests:
        store.free(r)
    store.reclaim()
    assert (store.committed_bytes, len(store)) == (0, 0)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
def test_eager_slots_have_memory_in_advance(background, deferred):
    store = VirtualKVStore(**SMALL, **LIMITS, eager=2, background=background, deferred_reclaim=deferred)
    granules = 4 * PAGE  # one in each layer's keys and values
    assert store.committed_bytes == 2 * granules
    r = store.alloc()
    store.settle()
    assert store.committed_bytes == 3 * granules
    store.ensure(r, 1)
    store.settle()
    store.free(r)
    store.settle()
    ahead = 4 * PAGE if background and deferred else 0  # the granule that was committed beyond the one of r
    assert store.committed_bytes == (3 if deferred else 2) * granules + ahead
    taken = [store.alloc() for _ in range(4)]
    store.settle()
    assert sorted(taken) == [0, 1, 2, 3]
    for r in taken:
        store.free(r)
    store.settle()
    assert store.committed_bytes >= 2 * granules
    store.reclaim()
    assert store.committed_bytes == 0


def test_the_background_thread_stays_one_granule_ahead():
    store = VirtualKVStore(**SMALL, **LIMITS, background=True)
    r = store.alloc()
    for n in range(1, 301):
        store.ensure(r, n)
        if n % 60 == 0:
            store.settle()
            granules = [min(-(-n * row // PAGE) + 1, -(-300 * row // PAGE)) for row in (128, 64)]
            assert store.committed_bytes == 2 * PAGE * sum(granules)
    store.free(r)
    store.settle()
    assert store.committed_bytes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("granule", [PAGE, 2 << 20])
def test_committed_bytes_are_resident(granule):
    gc.collect()
    before = resident()
    store = VirtualKVStore(4, 8, 128, max_requests=64, max_tokens=1 << 16, granule=granule, deferred_reclaim=True)
    assert store.reserved_bytes == 64 * (1 << 16) * store.bytes_per_token
    assert resident() - before < 8 << 20
    requests = [store.alloc() for _ in range(3)]
    for r in requests:
        store.ensure(r, 3000)
    piece = -(-3000 * 8 * 128 * 2 // granule) * granule
    assert store.committed_bytes == 3 * 8 * piece
    assert abs(resident() - before - store.committed_bytes) < 16 << 20
    for r in requests:
        store.free(r)
    store.reclaim()
    assert resident() - before < 16 << 20


# safety


def test_a_view_outlives_its_request_and_its_store(rng):
    store = VirtualKVStore(**SMALL, **LIMITS)
    r, expected = filled(rng, store, 100)
    keys, values = store.view(r, 1)
    assert not keys.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        keys[0] = 1
    other, others = filled(rng, store, 50)
    k, v = store.view(other, 0)
    store.free(r)
    assert np.isfinite(keys.sum() + values.sum())  # readable, whatever it says
    del store
    gc.collect()
    assert np.isfinite(keys.sum())
    np.testing.assert_array_equal(k, others[0][0])
    np.testing.assert_array_equal(v, others[0][1])
    assert expected[0][0].shape == (100, 2, 16)


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "blhd", "fused", "reversed", "stepped", "misaligned"])
def test_rows_are_converted_from_any_layout(rng, dtype, source, layout):
    store = VirtualKVStore(1, 3, 10, dtype=dtype, **LIMITS)
    r = store.alloc()
    store.ensure(r, 20)
    k, v = (normal(rng, (7, 3, 10), source, layout) for _ in range(2))
    store.write(r, 0, 13, k, v)
    for ours, given_rows in zip(store.view(r, 0), (k, v), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours[13:], given_rows.astype(F32).astype(dtype))
        assert not ours[:13].any()


def test_rows_may_come_from_the_store_but_not_from_where_they_go(rng):
    store = VirtualKVStore(1, 2, 8, dtype=BF16, **LIMITS)
    r, ((k, v),) = filled(rng, store, 30, layers=1, head_dim=8, dtype=BF16)
    keys, values = store.view(r, 0)
    store.write(r, 0, 20, keys[:10], values[:10])
    np.testing.assert_array_equal(keys[20:], k[:10])
    for first in (11, 20):
        with pytest.raises(ValueError, match=r"^k: .*overlap"):
            store.write(r, 0, 20, keys[first : first + 10], v[:10])
    with pytest.raises(ValueError, match=r"^v: .*overlap"):
        store.write(r, 0, 20, k[:5], values[18:23])
    np.testing.assert_array_equal(values[:20], v[:20])


def test_torch_rows(rng):
    torch = pytest.importorskip("torch")
    store = VirtualKVStore(1, 2, 8, **LIMITS)
    r = store.alloc()
    store.ensure(r, 5)
    k = torch.from_numpy(rng.standard_normal((5, 2, 8)).astype(F32))
    store.write(r, 0, 0, k.bfloat16(), k)
    for array in store.view(r, 0):
        np.testing.assert_array_equal(array.astype(F32), k.bfloat16().float().numpy())


def test_threads_each_with_a_request():
    store = VirtualKVStore(2, 2, 16, dtype=F32, max_requests=4, max_tokens=500, granule=PAGE, background=True, eager=1)
    wrong = []

    def live(number):
        for turn in range(15):
            r = store.alloc()
            mark = 100 * number + turn
            for n in range(0, 500, 50):
                store.ensure(r, n + 50)
                block = np.full((50, 2, 16), mark, F32)
                for layer in range(2):
                    before = store.view(r, layer)[0]
                    if not (before[:n] == mark).all() or before[n:].any():
                        wrong.append((number, turn, n))
                    store.write(r, layer, n, block, block)
            store.free(r)

    threads = [threading.Thread(target=live, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.settle()
    assert not wrong and len(store) == 0 and store.committed_bytes == 4 * PAGE


FORK = """
import os
import numpy as np
from longattn.kv import VirtualKVStore
store = VirtualKVStore(2, 2, 16, max_requests=4, max_tokens=5000, background=True, eager=1, granule=65536)
r = store.alloc()
store.settle()
child = os.fork()
store.ensure(r, 4000)
store.settle()
other = store.alloc()
store.free(other)
del store
if child == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_no_background_thread():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA")
def test_memory_that_the_system_refuses_is_a_memory_error():
    code = """
import resource
import numpy as np
from longattn.kv import VirtualKVStore
store = VirtualKVStore(2, 8, 128, max_requests=4, max_tokens=1 << 20)
r = store.alloc()
store.ensure(r, 1000)
committed = store.committed_bytes
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:"))
resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + (64 << 20),) * 2)
try:
    store.ensure(r, 20_000)
except MemoryError as error:
    assert "of a request" in str(error), error
    assert (store.tokens(r), store.committed_bytes) == (1000, committed)
    store.ensure(r, 2000)
    print("refused", store.tokens(r))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused 2000\n"


# bad inputs


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"layers": 0}, ValueError, "layers: got 0"),
        ({"kv_heads": 0}, ValueError, "kv_heads: got 0"),
        ({"head_dim": 0}, ValueError, "head_dim: got 0"),
        ({"value_dim": -1}, ValueError, "value_dim: got -1"),
        ({"max_requests": 0}, ValueError, "max_requests: got 0"),
        ({"max_tokens": 0}, ValueError, "max_tokens: got 0"),
        ({"max_tokens": 1 << 62}, ValueError, "max_tokens: got 4 requests x 4611686018427387904 tokens"),
        ({"max_tokens": 1 << 52}, (MemoryError, ValueError), "virtual store|address space"),
        ({"granule": 1000}, ValueError, "granule: got 1000, expected a power of two"),
        ({"granule": PAGE // 2}, ValueError, "granule: got"),
        ({"granule": 4 << 20}, ValueError, "granule: got 4194304"),
        ({"eager": -1}, ValueError, "eager: got -1"),
        ({"background": 1}, TypeError, "background: got 1"),
        ({"deferred_reclaim": None}, TypeError, "deferred_reclaim: got None"),
        ({"dtype": "int8"}, TypeError, "dtype: got 'int8'"),
        ({"layers": 2.0}, TypeError, "layers: got 2.0"),
    ],
)
def test_bad_sizes(arguments, error, match):
    with pytest.raises(error, match=match):
        VirtualKVStore(**SMALL | LIMITS | arguments)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s, r: s.ensure(r, 301), ValueError, "n_tokens: got 301, expected at most max_tokens, 300"),
        (lambda s, r: s.ensure(r, -1), ValueError, "n_tokens: got -1"),
        (lambda s, r: s.ensure(r, 1.5), TypeError, "n_tokens: got 1.5"),
        (lambda s, r: s.ensure(r + 1, 1), ValueError, "r: got 1, expected a request"),
        (lambda s, r: s.ensure(99, 1), ValueError, "r: got 99"),
        (lambda s, r: s.free(1), ValueError, "r: got 1"),
        (lambda s, r: s.free("0"), TypeError, "r: got '0'"),
        (lambda s, r: s.tokens(2), ValueError, "r: got 2"),
        (lambda s, r: s.view(r, 2), ValueError, "layer: got 2, expected less than layers, 2"),
        (lambda s, r: s.view(1, 0), ValueError, "r: got 1"),
        (lambda s, r: s.write(r, 5, 0, *ONES), ValueError, "layer: got 5"),
        (lambda s, r: s.write(r, 0, 9, *ONES), ValueError, "start: got 2 rows from row 9 on, .* the 10 ensured"),
        (lambda s, r: s.write(r, 0, -1, *ONES), ValueError, "start: got -1"),
        (lambda s, r: s.write(r, 0, 2**63 - 1, *ONES), ValueError, "start: got 2 rows"),
        (lambda s, r: s.write(r, 0, 0, ONES[0][:, :1], ONES[1]), ValueError, r"k: got shape \[2, 1, 16\]"),
        (lambda s, r: s.write(r, 0, 0, ONES[0], ONES[1][:1]), ValueError, r"v: got shape \[1, 2, 8\]"),
        (lambda s, r: s.write(r, 0, 0, ONES[0], ONES[0]), ValueError, r"v: got shape \[2, 2, 16\]"),
        (lambda s, r: s.write(r, 0, 0, ONES[0][0], ONES[1]), ValueError, "k: got shape"),
        (lambda s, r: s.write(r, 0, 0, ONES[0].astype(int), ONES[1]), TypeError, "k: got dtype int64"),
        (lambda s, r: s.write(r, 0, 0, ONES[0], ONES[1].tolist()), TypeError, "v: got list"),
    ],
)
def test_bad_calls_change_nothing(rng, call, error, match):
    store = VirtualKVStore(**SMALL, **LIMITS)
    r, expected = filled(rng, store, 10)
    before = store.committed_bytes
    with pytest.raises(error, match=f"^{match}"):
        call(store, r)
    assert (store.committed_bytes, store.tokens(r), len(store)) == (before, 10, 1)
    np.testing.assert_array_equal(store.view(r, 0)[0], expected[0][0])


ONES = np.ones((2, 2, 16), F32), np.ones((2, 2, 8), F32)


def test_freed_twice(rng):
    store = VirtualKVStore(**SMALL, **LIMITS)
    r = store.alloc()
    store.free(r)
    with pytest.raises(ValueError, match=r"^r: got 0"):
        store.free(r)
    assert "max_requests=4" in repr(store)
