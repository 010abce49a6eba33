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
    other = la.KVStore(kv_heads=2, head_dim=64, capacity=8)
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
    with pytest.raises(ValueError, match="sinks, window"):
        HostKVCache(other, la.index.Flat(other), window=0, device=device)
