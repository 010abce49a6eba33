"""`HostKVCache`: what the device and the host hold is one sequence, whatever came in which pieces."""

import numpy as np
import pytest

import longattn as la
import tolerances
from emu.device import EmulatorDevice
from gpu.conftest import get, put
from longattn import gpu
from longattn.gpu import Costs, HostKVCache, _costs
from longattn.gpu._costs import Line
from longattn.reference import dense as reference
from random_arrays import BF16, F16, F32, qkv


def cache_of(device, dtype, *, kv_heads=2, index=la.index.Flat, sinks=4, window=32, capacity=4096, **how):
    store = la.KVStore(kv_heads=kv_heads, head_dim=64, dtype=str(dtype), capacity=capacity)
    return HostKVCache(store, index(store), sinks=sinks, window=window, device=device, **how)


def arrays(rng, dtype, keys):
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=1, keys=keys, dim=64, q_dtype=dtype, kv_dtype=dtype)
    return q, k, v


def check(device, cache, q, k, v, **options):
    out = get(cache.attend(put(device, q), **options))
    assert out.dtype == q.dtype and out.shape == q.shape
    expected, expected_lse = reference.attention(q, k, v, return_lse=True)
    del expected_lse
    tolerances.device_attention(q, k, v).check(out, expected)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_reading_all_rows_is_exact_attention(rng, device, dtype):
    """A prompt, then tokens one by one, around the ring more than once."""
    q, k, v = arrays(rng, dtype, 150)
    cache = cache_of(device, dtype)
    cache.append(put(device, k[:, :, :70]), put(device, v[:, :, :70]))
    check(device, cache, q, k[:, :, :70], v[:, :, :70], top_k=150)
    for n in range(70, 150, 8):
        cache.append(put(device, k[:, :, n : n + 8]), put(device, v[:, :, n : n + 8]))
        assert len(cache) == n + 8 and len(cache.store) == n + 8 - 32 - 4
    check(device, cache, q, k, v, top_k=150)


@pytest.mark.parametrize("sinks", [0, 4])
def test_lengths_around_sinks_and_window(rng, sinks):
    device = EmulatorDevice()
    q, k, v = arrays(rng, F32, 60)
    cache = cache_of(device, F32, sinks=sinks, window=8)
    for n in range(20):
        cache.append(put(device, k[:, :, n : n + 1]), put(device, v[:, :, n : n + 1]))
        assert len(cache.store) == max(n + 1 - 8 - sinks, 0)
        check(device, cache, q, k[:, :, : n + 1], v[:, :, : n + 1], top_k=60)


@pytest.mark.parametrize("pieces", [(3, 57), (60,), (1, 2, 40, 17), (59, 1), (11, 0, 49)])
def test_pieces_do_not_matter(rng, pieces):
    device = EmulatorDevice()
    q, k, v = arrays(rng, F32, 60)
    cache, at = cache_of(device, F32, window=10), 0
    for n in pieces:
        cache.append(put(device, k[:, :, at : at + n]), put(device, v[:, :, at : at + n]))
        at += n
    np.testing.assert_array_equal(cache.store.keys, k[0, :, 4:50])
    np.testing.assert_array_equal(cache.store.values, v[0, :, 4:50])
    check(device, cache, q, k, v, top_k=60)


def test_the_host_waits_for_rows_that_enter_the_store(rng):
    """For no others: a token's copy has a whole window of steps to arrive."""

    class Counting(EmulatorDevice):
        waited = 0

        def download(self, x):
            arrived = super().download(x)

            def wait():
                self.waited += 1
                return arrived()

            return wait

    device = Counting()
    _, k, v = arrays(rng, F32, 40)
    cache = cache_of(device, F32, window=16)
    for n in range(16):
        cache.append(k[:, :, n : n + 1], v[:, :, n : n + 1])
    assert device.waited == 0
    for n in range(16, 40):
        cache.append(k[:, :, n : n + 1], v[:, :, n : n + 1])
        assert len(cache.store) == max(n + 1 - 20, 0)
        assert device.waited <= 4 * (
            n + 1 - 16
        )  # keys and values of the token that leaves, to be read and to be let go
    np.testing.assert_array_equal(cache.store.keys, k[0, :, 4:24])


def test_retrieval_is_that_of_the_host(rng):
    """With a budget, the result is the merge of exact attention here and retrieval there."""
    device = EmulatorDevice()
    q, k, v = arrays(rng, F32, 3000)
    cache = cache_of(device, F32, index=la.index.Signatures, window=64)
    cache.append(put(device, k), put(device, v))
    out, stats = cache.attend(put(device, q), top_k=100, return_stats=True)
    there = la.retrieval_attention(q[0], cache.store, cache.index, top_k=100, sinks=0, window=0)
    steady = np.r_[0:4, 3000 - 64 : 3000]
    here = la.attention(q, k[:, :, steady], v[:, :, steady], return_lse=True)
    expected, _ = la.merge([here, (there.out[None], there.lse[None])])
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert stats.way == "host"
    np.testing.assert_array_equal(stats.retrieval.keys_attended, there.stats.keys_attended)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_gathering_all_rows_is_exact_attention(rng, device, dtype):
    """Before there are codes, with codes, and with rows since then that have none."""
    q, k, v = arrays(rng, dtype, 700)
    cache, at = cache_of(device, dtype, reads="gather"), 0
    for n in (90, 640, 700):
        cache.append(put(device, k[:, :, at:n]), put(device, v[:, :, at:n]))
        at = n
        check(device, cache, q, k[:, :, :n], v[:, :, :n], top_k=700)


def test_gathered_rows_are_those_of_most_estimated_weight(rng):
    device = EmulatorDevice()
    q, k, v = arrays(rng, F32, 900)
    cache = cache_of(device, F32, reads="gather")
    cache.append(k, v)
    out, stats = cache.attend(q, top_k=40, return_stats=True)
    held = 900 - 36
    assert stats.way == "gather" and stats.gathered == 40 + held % 16 and stats.retrieval is None
    codes = gpu.signatures_encode(k[:, :, 4 : 4 + held // 16 * 16], device=device)
    rows = gpu.signatures_topk(q.reshape(1, 2, 2, 64), codes, 40, device=device)[0] + 4
    steady = np.r_[0:4, 4 + held // 16 * 16 : 900]
    lists = np.concatenate([rows, np.tile(steady, (2, 1))], axis=1)[None]
    expected = gpu.index_sparse_attention(q, k, v, lists, device=device)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("codes", ["int8", "int4"])
def test_a_store_of_codes_is_attention_to_what_they_stand_for(rng, device, dtype, codes):
    """Before there are codes on the device, with them, and with rows since that have none; and to all rows."""
    q, k, v = arrays(rng, dtype, 700)
    cache, at = coded_cache(device, codes), 0
    for n in (90, 640, 700):
        cache.append(put(device, k[:, :, at:n]), put(device, v[:, :, at:n]))
        at = n
        inside = slice(4, n - 32)
        held = [np.array(x[:, :, :n], np.float32) for x in (k, v)]
        for x, coded in zip(held, (cache.store.keys, cache.store.values), strict=True):
            np.testing.assert_allclose(np.asarray(coded), x[0, :, inside], atol=0.02 if codes == "int8" else 0.3)
            x[0, :, inside] = np.asarray(coded)
        expected = reference.attention(q, *held)
        for top_k in (700, None):
            out, stats = cache.attend(put(device, q), top_k=top_k, return_stats=True)
            tolerances.device_attention(q, *(x.astype(dtype) for x in held)).check(get(out), expected)
            assert (stats.way, stats.listed) == ("host", n - 36)


def coded_cache(device, dtype, **how):
    store = la.KVStore(kv_heads=2, head_dim=64, dtype=dtype, capacity=4096)
    return HostKVCache(store, None, sinks=4, window=32, device=device, **how)


def test_without_an_index_the_device_chooses(rng):
    """Rows of a store of codes, and of one of numbers, are those that are gathered otherwise."""
    device = EmulatorDevice()
    q, k, v = arrays(rng, F32, 900)
    gathering = cache_of(device, F32, reads="gather")
    plain, coded = (coded_cache(device, dtype) for dtype in ("float32", "int8"))
    for cache in (gathering, plain, coded):
        cache.append(k, v)
    expected = gathering.attend(q, top_k=40)
    out, stats = plain.attend(q, top_k=40, return_stats=True)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert stats.listed == 40 + (900 - 36) % 16
    rows = coded._chosen(q, 40, None)()  # by codes of what the codes stand for, so that a row may be another one
    there = la.dense.listed_attention(q[0], coded.store.keys, coded.store.values, rows, return_lse=True)
    steady = np.r_[0:4, 900 - 32 : 900]
    here = la.attention(q, k[:, :, steady], v[:, :, steady], return_lse=True)
    np.testing.assert_allclose(coded.attend(q, top_k=40), la.merge([here, [x[None] for x in there]])[0], atol=1e-5)


def test_rows_of_a_store_of_codes_come_back_to_the_device(rng):
    device = EmulatorDevice()
    q, k, v = arrays(rng, BF16, 200)
    cache = coded_cache(device, "int8")
    cache.append(k, v)
    keys = np.concatenate([keys for keys, _ in cache.rows_on_device(q, 50)], axis=2)
    assert keys.dtype == BF16 and keys.shape == k.shape
    np.testing.assert_allclose(*(np.sort(x.astype(np.float32), axis=2) for x in (keys, k)), atol=0.05)


def test_codes_are_fitted_anew_when_the_store_has_grown_fourfold(rng):
    """Keys that drift: after the fit, codes are those of all rows together."""
    device = EmulatorDevice()
    q, k, v = arrays(rng, F32, 2700)
    k += np.linspace(0, 3, 2700, dtype=np.float32)[:, None]
    cache, at, fitted = cache_of(device, F32, reads="gather"), 0, {}
    for n in (600, 1500, 2700):
        cache.append(k[:, :, at:n], v[:, :, at:n])
        at = n
        cache.attend(q, top_k=40)
        fitted[n] = cache._codes.centre.copy()
        rows = (n - 36) // 16 * 16
        assert cache._coded == rows
        about = {600: rows, 1500: (600 - 36) // 16 * 16, 2700: rows}[n]
        np.testing.assert_allclose(fitted[n], k[:, :, 4 : 4 + about].mean(2), atol=1e-4)
        made = gpu.signatures_encode(k[:, :, 4 : 4 + rows], fitted=cache._codes, device=device)
        np.testing.assert_array_equal(cache._codes.codes[:, :, : rows // 16], made.codes)


def test_sink_logits_take_their_share_once(rng, device):
    q, k, v = arrays(rng, F32, 150)
    sinks = np.array([0.5, 2.0, -1.0, 1.0], np.float32)
    for reads in ("host", "gather"):
        cache = cache_of(device, F32, reads=reads)
        cache.append(put(device, k), put(device, v))
        out = get(cache.attend(put(device, q), top_k=150, sink_logits=put(device, sinks)))
        expected = reference.attention(q, k, v, sinks=sinks)
        tolerances.device_attention(q, k, v, offset=2.0).check(out, expected)


class TestCosts:
    def test_a_line_goes_through_both_points(self):
        line = Line.through(1e3, 3e-6, 5e3, 7e-6)
        assert line.start == pytest.approx(2e-6) and line.rate == pytest.approx(1e9)
        assert line.seconds(9e3) == pytest.approx(11e-6)

    @pytest.mark.parametrize("many", [3e-6, 1e-6, 0.0])
    def test_noise_gives_no_negative_cost(self, many):
        line = Line.through(1e3, 3e-6, 5e3, many)
        assert line.start >= 0 and line.rate > 0 and line.seconds(1e9) > 0

    def test_the_cheaper_way_is_taken(self, rng):
        q, k, v = arrays(rng, F32, 900)
        slow, fast = Line(1e-3, 1e9), Line(1e-6, 1e12)
        for costs, way in ((Costs(slow, fast, fast), "gather"), (Costs(fast, slow, fast), "host")):
            cache = cache_of(EmulatorDevice(), F32, reads="auto", costs=costs)
            cache.append(k, v)
            assert cache.attend(q, top_k=40, return_stats=True)[1].way == way
            assert cache.attend(q, return_stats=True)[1].way == "host"  # without a number of rows there is no choice

    def test_few_rows_are_gathered_and_many_are_not(self):
        """A bus is slower than the host's memory, and a hand-over to the host costs more than one to the device."""
        costs = Costs(host=Line(60e-6, 150e9), gather=Line(20e-6, 25e9), scan=Line(10e-6, 2000e9))
        assert costs.prefers_gather(131072, 64, 4096, 528)
        assert not costs.prefers_gather(131072, 4096, 4096, 528)
        assert "host: 60.0 us + 150.00 GB/s" in str(costs)

    def test_costs_are_measured_once_by_the_device(self, rng, monkeypatch):
        monkeypatch.setattr(_costs, "_MANY", 1024)  # enough where the clock has no noise

        class Clocked(EmulatorDevice):
            """Uploads take a microsecond and a nanosecond a byte, launches five microseconds."""

            def upload(self, x, like):
                self.now += 1e-6 + 1e-9 * x.nbytes
                return super().upload(x, like)

            def kernel(self, source_name, name):
                self.now += 5e-6
                return super().kernel(source_name, name)

        q, k, v = arrays(rng, F32, 200)
        device = Clocked()
        cache = cache_of(device, F32, reads="auto", window=16)
        cache.append(k, v)
        _, stats = cache.attend(q, top_k=20, return_stats=True)
        costs = cache.costs
        # A row of keys and values is 1024 bytes; two uploads and two launches, a decode and its merge.
        assert costs.gather.rate == pytest.approx(1e9) and costs.gather.start == pytest.approx(12e-6)
        assert costs.scan.start == pytest.approx(5e-6 * 9, rel=1e-3) and stats.way == "host"
        cache.attend(q, top_k=20)
        assert cache.costs is costs


def test_bad_input(rng):
    device = EmulatorDevice()
    q, k, v = arrays(rng, F32, 40)
    cache = cache_of(device, F32, capacity=8, window=16)
    with pytest.raises(ValueError, match="without tokens"):
        cache.attend(q)
    with pytest.raises(TypeError, match="k: got dtype float16, expected float32"):
        cache.append(k.astype(F16), v)
    with pytest.raises(ValueError, match="v: got shape"):
        cache.append(k, v[:, :, :3])
    with pytest.raises(ValueError, match="k: got 40 tokens, 20 would be on the host"):
        cache.append(k, v)
    assert len(cache) == 0
    cache.append(k[:, :, :28], v[:, :, :28])
    with pytest.raises(ValueError, match="q: got shape"):
        cache.attend(np.concatenate([q, q], axis=2))
    for options in ({"sinks": 3}, {"topk": 5}):
        with pytest.raises(TypeError, match=f"{next(iter(options))}: got an option that does not exist here"):
            cache.attend(q, **options)
    other = la.KVStore(kv_heads=2, head_dim=64, capacity=8)
    with pytest.raises(TypeError, match="costs: got float, expected Costs or None"):
        HostKVCache(other, None, costs=1.0, device=device)
    with pytest.raises(ValueError, match="another store"):
        HostKVCache(other, la.index.Flat(cache.store), device=device)
    with pytest.raises(ValueError, match="expected an empty store"):
        HostKVCache(cache.store, cache.index, device=device)
    with pytest.raises(ValueError, match="reads: got 'bus'"):
        HostKVCache(other, la.index.Flat(other), reads="bus", device=device)
    gathering = cache_of(device, F32, reads="gather")
    gathering.append(k, v)
    for options in ({}, {"top_k": 4, "rest": "none"}):
        with pytest.raises(ValueError, match="expected top_k alone"):
            gathering.attend(q, **options)
    coded = la.KVStore(kv_heads=2, head_dim=64, dtype="int8", capacity=8)
    with pytest.raises(ValueError, match="reads: got 'gather' with a store of int8, expected 'host'"):
        HostKVCache(coded, None, reads="gather", device=device)
    with pytest.raises(ValueError, match=r"top_k: got 4 with \['epsilon'\], expected at least 1, alone"):
        without = coded_cache(device, "int8")
        without.append(k, v)
        without.attend(q, top_k=4, epsilon=0.1)
    with pytest.raises(TypeError, match="k: got dtype float16, expected float32"):
        without.append(k.astype(F16), v.astype(F16))
    with pytest.raises(ValueError, match="sinks, window"):
        HostKVCache(other, la.index.Flat(other), window=0, device=device)
