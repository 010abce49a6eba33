"""The back end over CuPy, driven by a stand-in for CuPy: public calls from arrays of a device to kernels and back."""

import json

import numpy as np
import pytest

import longattn as la
import tolerances
from emu import emulator
from longattn import cli, gpu
from longattn.gpu import _costs
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F16, F32, qkv

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_public_attention(rng, cupy, dtype, rows):
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=rows, keys=90, dim=128, q_dtype=dtype, kv_dtype=dtype)
    arrays = [cupy.asarray(x) for x in (q, k, v)]
    for options in ({}, {"mask": rng.random((rows, 90)) < 0.5, "sinks": np.zeros(4, np.float32)}):
        placed = {name: cupy.asarray(x) for name, x in options.items()}
        out, lse = la.attention(*arrays, causal=True, return_lse=True, **placed)
        assert isinstance(out, cupy.ndarray) and isinstance(lse, cupy.ndarray)
        expected, expected_lse = reference.attention(q, k, v, causal=True, return_lse=True, **options)
        tolerances.device_attention(q, k, v).check(out.get(), expected, lse.get(), expected_lse)


def test_packed_sequences_and_strides(rng, cupy):
    q, k, v = (cupy.asarray(rng.standard_normal((70, 2, 2, 64)).astype(F16))[:, 0] for _ in "qkv")
    ends = np.array([0, 30, 70])
    out = la.attention_varlen(q, k, v, cupy.asarray(ends), ends, causal=True)
    expected = reference.attention_varlen(*(x.get() for x in (q, k, v)), ends, ends, causal=True)
    tolerances.device_attention(*(x.get() for x in (q, k, v))).check(out.get(), expected)


@pytest.mark.parametrize("reads", ["host", "gather", "auto"])
def test_host_cache(rng, cupy, monkeypatch, reads):
    """Copies both ways, by page-locked memory; what is measured at the first step."""
    monkeypatch.setattr(_costs, "_MANY", 600)
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=1, keys=600, dim=64, q_dtype=BF16, kv_dtype=BF16)
    store = la.KVStore(kv_heads=2, head_dim=64, dtype="bfloat16", capacity=1024)
    cache = gpu.HostKVCache(store, la.index.Flat(store), window=32, reads=reads)
    cache.append(cupy.asarray(k), cupy.asarray(v))
    out = cache.attend(cupy.asarray(q), top_k=600)
    tolerances.device_attention(q, k, v).check(out.get(), reference.attention(q, k, v))
    assert (cache.costs is not None) == (reads == "auto")


def test_arrays_of_the_host_beside_those_of_a_device(rng, cupy):
    q, k, v = qkv(rng, heads=1, kv_heads=1, rows=1, keys=20, dim=64, q_dtype=F32, kv_dtype=F32)
    with pytest.raises(TypeError, match=r"k: got numpy.ndarray, expected a CuPy array"):
        la.attention(cupy.asarray(q), k, v)


def test_the_benchmark_runs_from_its_command(cupy, tmp_path, capsys):
    """Every case once at tiny sizes: JSON with figures for all that is asked. As compute-sanitizer runs it."""
    to = tmp_path / "gpu.json"
    command = ["bench", "gpu", "--quick", "--no-peers", "--rounds", "1", "--parts", "times", "--json", str(to)]
    assert cli.main([*command, "--own-allocations"]) == 0
    assert cupy.cuda.set_allocator.__self__ == [None]
    (result,) = json.loads(to.read_text()) if to.read_text().startswith("[") else [json.loads(to.read_text())]
    assert result["device"] == "no GPU, an emulator"
    rows = result["rows"]
    assert not [row for row in rows if "outcome" in row]
    for figure in ("of_copy", "of_asked", "over_density", "of_rows_copy", "ms"):
        assert any(row.get(figure) for row in rows), figure
    capsys.readouterr()
