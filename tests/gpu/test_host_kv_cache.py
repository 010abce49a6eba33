"""`HostKVCache`: what the device and the host hold is one sequence, whatever came in which pieces."""

import numpy as np
import pytest

import longattn as la
import tolerances
from emu.device import EmulatorDevice
from gpu.conftest import get, put
from longattn.gpu import HostKVCache
from longattn.reference import dense as reference
from random_arrays import BF16, F16, F32, qkv


def cache_of(device, dtype, *, kv_heads=2, index=la.index.Flat, sinks=4, window=32, capacity=4096):
    store = la.KVStore(kv_heads=kv_heads, head_dim=64, dtype=str(dtype), capacity=capacity)
    return HostKVCache(store, index(store), sinks=sinks, window=window, device=device)


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
    np.testing.assert_array_equal(stats.keys_attended, there.stats.keys_attended)


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
    with pytest.raises(ValueError, match="sinks, window"):
        HostKVCache(other, la.index.Flat(other), window=0, device=device)
