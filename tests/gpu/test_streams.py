"""Kernels go where their arrays are: to the device, and to the stream of the arrays' kind.

CuPy and torch are stand-ins.
"""

import sys

import numpy as np
import pytest

import longattn as la
import tolerances
from emu import emulator
from gpu import fake_cupy, fake_torch
from gpu.fake_cupy import Device, launches
from longattn import gpu
from longattn.gpu import _costs, _cupy
from longattn.reference import dense as reference
from random_arrays import BF16, F16, F32, qkv

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")


@pytest.fixture
def torch(cupy, monkeypatch):
    """Torch with a GPU, as far as it is needed."""
    made = fake_torch.module()
    monkeypatch.setitem(sys.modules, "torch", made)
    return made


def arrays(rng, dtype=F16, rows=1, keys=20, dim=64):
    return qkv(rng, heads=2, kv_heads=1, rows=rows, keys=keys, dim=dim, q_dtype=dtype, kv_dtype=dtype)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_torch_tensors(rng, torch, number, dtype):
    """Torch's current stream of the tensors' device, which is not the current one."""
    q, k, v = arrays(rng, dtype)
    tensors = [fake_torch.on_device(x, number) for x in (q, k, v)]
    made = []
    started = launches(lambda: made.extend(la.attention(*tensors, return_lse=True)))
    assert started == [(number, fake_torch.STREAMS[number])] * 2  # a split, a merge
    out, lse = made
    assert isinstance(out, torch.Tensor) and (out.device.index, lse.device.index) == (number, number)
    expected, expected_lse = reference.attention(q, k, v, return_lse=True)
    tolerances.device_attention(q, k, v).check(out.held, expected, lse.held, expected_lse)
    assert Device().id == 0


@pytest.mark.parametrize("number", [0, 1])
def test_cupy_arrays(rng, cupy, torch, number):
    """CuPy's own stream, whatever torch uses, on the arrays' device."""
    with cupy.cuda.Device(number):
        q, k, v = (cupy.asarray(x) for x in arrays(rng))
    made = []
    assert launches(lambda: made.append(la.attention(q, k, v))) == [(number, 0)] * 2
    assert made[0].device.id == number


def test_a_stream_of_cupy_that_the_caller_entered(rng, cupy):
    class Mine:
        def __cuda_stream__(self):
            return 0, 55

    q, k, v = (cupy.asarray(x) for x in arrays(rng))
    with cupy.cuda.Stream.from_external(Mine()):
        assert launches(lambda: la.attention(q, k, v)) == [(0, 55)] * 2


def test_arrays_of_several_devices(rng, torch):
    q, k, v = arrays(rng)
    tensors = fake_torch.on_device(q, 1), fake_torch.on_device(k, 1), fake_torch.on_device(v, 0)
    with pytest.raises(ValueError, match="v: got an array of device 0, expected device 1"):
        la.attention(*tensors)


def test_tensors_that_require_grad(rng, torch):
    tensors = [fake_torch.on_device(x) for x in arrays(rng)]
    tensors[1].requires_grad = True
    with pytest.raises(ValueError, match="k: got a tensor that requires grad"):
        la.attention(*tensors)


def test_tensors_of_the_host(rng, torch):
    tensors = [fake_torch.on_device(x) for x in arrays(rng)]
    tensors[1] = torch.from_numpy(np.zeros((1, 1, 20, 64), F16))
    with pytest.raises(TypeError, match=r"k: got gpu\.fake_torch\.Tensor, expected a CuPy array or a torch CUDA"):
        la.attention(*tensors)


def test_merge_and_lists_of_torch(rng, torch):
    """Torch's branches of copies: parts side by side, integers from the host, strides that need a copy."""
    q, k, v = arrays(rng, BF16, keys=90)
    asked = fake_torch.on_device(q, 1)
    wide = [fake_torch.on_device(np.concatenate([x, x], axis=3)[..., 1:], 1)[..., :64] for x in (k, v)]
    k, v = (x.held.__array__() for x in wide)
    parts = []
    for rows in (np.arange(40), np.arange(40, 90)):
        listed = rows.astype(np.int64)[None, None]
        parts.append(gpu.index_sparse_attention(asked, *wide, listed, return_lse=True))
    out, lse = gpu.merge(iter(parts), dtype="float32")
    expected, expected_lse = reference.attention(q, k, v, return_lse=True)
    tolerances.device_attention(q, k, v).check(out.held.astype(BF16), expected, lse.held, expected_lse)


@pytest.mark.parametrize("reads", ["host", "gather", "auto"])
def test_host_cache(rng, torch, monkeypatch, reads):
    """Copies both ways, zeros, and times, on torch's stream of a device that is not the current one."""
    monkeypatch.setattr(_costs, "_MANY", 600)
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=1, keys=600, dim=64, q_dtype=BF16, kv_dtype=BF16)
    store = la.KVStore(kv_heads=2, head_dim=64, dtype="bfloat16", capacity=1024)
    cache = gpu.HostKVCache(store, la.index.Flat(store), window=32, reads=reads)
    asked, keys, values = (fake_torch.on_device(x, 1) for x in (q, k, v))
    cache.append(keys, values)
    made = []
    assert set(launches(lambda: made.append(cache.attend(asked, top_k=600)))) == {(1, fake_torch.STREAMS[1])}
    tolerances.device_attention(q, k, v).check(made[0].held, reference.attention(q, k, v))


@pytest.mark.parametrize("without", ["wait", "follow", "arrival"])
@pytest.mark.parametrize("kind", ["cupy", "torch"])
def test_a_missing_wait_shows(rng, cupy, torch, monkeypatch, kind, without):
    """Copies run as late as they may: without one of the waits a result is not there yet."""
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=1, keys=90, dim=64, q_dtype=F32, kv_dtype=F32)
    asked, keys, values = (cupy.asarray(x) if kind == "cupy" else fake_torch.on_device(x) for x in (q, k, v))

    def attended():
        store = la.KVStore(kv_heads=2, head_dim=64, dtype="float32", capacity=1024)
        cache = gpu.HostKVCache(store, la.index.Flat(store), window=32)
        cache.append(keys, values)
        found = cache.attend(asked, top_k=90)
        return found.get() if kind == "cupy" else found.held

    tolerances.device_attention(q, k, v).check(attended(), reference.attention(q, k, v))
    if without == "arrival":  # of rows, on the caller's stream
        monkeypatch.setattr(fake_cupy._Event, "synchronize", lambda self: None)
    else:
        monkeypatch.setattr(_cupy.CupyDevice, without, lambda self, *_, **__: None)
    with np.errstate(invalid="ignore"), pytest.raises((AssertionError, ValueError)):
        tolerances.device_attention(q, k, v).check(attended(), reference.attention(q, k, v))


def test_marks_and_waits_are_of_their_streams(torch, cupy):
    """What follows an event is the stream that is said, and the event is of the other."""
    device = _cupy.holding(fake_torch.on_device(np.zeros((1, 1, 1, 64), F32), 1))
    calls = fake_cupy.recorded(lambda: device.follow(device.mark(), side=True))
    side = calls[-1][1]
    assert calls == [("record", fake_torch.STREAMS[1]), ("wait", side)] and side in fake_cupy._Stream.made
    assert fake_cupy.recorded(lambda: device.follow(device.mark(side=True))) == [
        ("record", side),
        ("wait", fake_torch.STREAMS[1]),
    ]
