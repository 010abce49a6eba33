"""Neighbourhood attention of `longattn.gpu` against the rule, one token at a time."""

import sys

import numpy as np
import pytest

from emu import emulator
from emu.device import EmulatorDevice
from gpu.conftest import function_of, get, put, tolerance_of
from longattn import gpu, sparse
from longattn.reference.sparse.generalized_neighborhood_attention import generalized_neighborhood_attention as oracle
from random_arrays import BF16, DTYPES, F16, F32

GRIDS = {
    "line": ((150,), {"window": 21}),
    "line, even window": ((70,), {"window": 8, "stride": 3}),
    "line, causal": ((130,), {"window": 40, "causal": True}),
    "line, causal in strides": ((70,), {"window": 9, "stride": 4, "causal": True}),
    "line, dilated": ((95,), {"window": 5, "dilation": 7}),
    "square": ((13, 11), {"window": 5}),
    "square, of two rules": (
        (9, 20),
        {"window": (3, 6), "stride": (2, 5), "dilation": (2, 3), "causal": (False, True)},
    ),
    "blocks": ((8, 16), {"window": 4, "stride": 4}),
    "all": ((6, 5), {"window": (6, 5)}),
    "cube": ((5, 6, 7), {"window": 3}),
    "cube, causal in time": ((6, 5, 9), {"window": (4, 3, 2), "dilation": (1, 1, 3), "causal": (True, False, False)}),
}


def check(device, q, k, v, **options):
    placed = {name: put(device, x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    arrays_ = (put(device, x) for x in (q, k, v))
    function = function_of(device, sparse.generalized_neighborhood_attention, gpu.generalized_neighborhood_attention)
    out, lse = function(*arrays_, return_lse=True, **placed)
    out, lse = get(out), get(lse)
    assert out.shape == q.shape and out.dtype == q.dtype and lse.shape == q.shape[:-1]
    expected, expected_lse = oracle(q, k, v, return_lse=True, **options)
    q, k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (q, k, v))
    offset = np.max(options.get("sinks", 0.0))
    scale = float(np.max(options["scale"])) if "scale" in options else None
    tolerance = tolerance_of(device, q, k, v, scale=scale, offset=offset, together=8)
    tolerance.check(out, expected, lse, expected_lse)


def arrays(rng, dtype, grid, *, heads=2, kv_heads=1, dim=64, batch=1):
    shapes = (batch, heads, *grid, dim), (batch, kv_heads, *grid, dim), (batch, kv_heads, *grid, dim)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRIDS)
def test_windows(rng, anywhere, dtype, case):
    grid, options = GRIDS[case]
    check(anywhere, *arrays(rng, dtype, grid), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [128, 256])
def test_head_sizes(rng, anywhere, dtype, dim):
    check(anywhere, *arrays(rng, dtype, (6, 9), dim=dim), window=(3, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 4, 8])
def test_groups_of_heads(rng, anywhere, dtype, group):
    q, k, v = arrays(rng, dtype, (5, 6), heads=2 * group, kv_heads=2)
    check(anywhere, q, k, v, window=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_options_of_scores(rng, anywhere, dtype, dim):
    q, k, v = arrays(rng, dtype, (5, 6), batch=2, heads=4, kv_heads=2, dim=dim)
    check(anywhere, q, k, v, window=3, softcap=1.5, sinks=rng.standard_normal(4).astype(np.float32), scale=0.1)
    scale = rng.uniform(0.05, 0.1, (2, 4, 30)).astype(np.float32)
    check(anywhere, q, k, v, window=3, scale=scale)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_heads_last_and_crops(rng, device, dtype):
    """Grids as vision models have them, without a copy; a crop, with one."""
    q, k, v = arrays(rng, dtype, (9, 10), heads=2, kv_heads=2)
    plain = get(gpu.generalized_neighborhood_attention(*(put(device, x) for x in (q, k, v)), window=3, device=device))
    last = (np.moveaxis(put(device, np.ascontiguousarray(np.moveaxis(x, 1, -2))), -2, 1) for x in (q, k, v))
    np.testing.assert_array_equal(get(gpu.generalized_neighborhood_attention(*last, window=3, device=device)), plain)
    wide = [put(device, np.pad(x, ((0, 0), (0, 0), (0, 0), (2, 3), (0, 0))))[:, :, :, 2:-3] for x in (q, k, v)]
    np.testing.assert_array_equal(get(gpu.generalized_neighborhood_attention(*wide, window=3, device=device)), plain)


def test_a_line_is_a_sliding_window(rng, device):
    q, k, v = (put(device, x) for x in arrays(rng, BF16, (140,)))
    there = get(gpu.generalized_neighborhood_attention(q, k, v, window=30, causal=True, device=device))
    window = get(gpu.attention(q, k, v, window=(29, 0), device=device))
    np.testing.assert_allclose(there.astype(np.float32), window.astype(np.float32), atol=2.0**-6)


def test_thread_orders_give_the_same_bits(rng):
    if not emulator.available():
        pytest.skip("the emulator needs g++ on x86-64")
    q, k, v = arrays(rng, F16, (9, 10))
    results = [
        gpu.generalized_neighborhood_attention(q, k, v, window=3, device=EmulatorDevice(order))
        for order in emulator.ORDERS
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_the_public_function_sends_arrays_of_a_gpu_there(rng, monkeypatch):
    seen = []
    there = sys.modules["longattn.sparse.generalized_neighborhood_attention"]
    monkeypatch.setattr(there, "is_on_gpu", lambda x: True)
    monkeypatch.setattr(there, "on_gpu", lambda *arrays, **options: seen.append(options))
    q, k, v = arrays(rng, F32, (9, 10))
    sparse.generalized_neighborhood_attention(q, k, v, window=3, causal=(True, False), softcap=2.0, return_lse=True)
    given = {"window": 3, "stride": 1, "dilation": 1, "causal": (True, False), "scale": None, "sinks": None}
    assert seen == [{**given, "softcap": 2.0, "return_lse": True}]
    for option in ("extra_k", "extra_v", "bias"):
        with pytest.raises(ValueError, match=f"{option}: not offered for arrays of a GPU"):
            sparse.generalized_neighborhood_attention(q, k, v, window=3, **{option: q})


def test_bad_input(rng):
    device = EmulatorDevice()
    q, k, v = arrays(rng, F32, (9, 10))
    for change, error, message in (
        ({"k": k[:, :, :8]}, ValueError, r"k: got shape \(1, 1, 8, 10, 64\), expected the grid \(9, 10\)"),
        ({"v": v.astype(F16)}, TypeError, "v: got dtype float16"),
        ({"q": q[:, :, 0, 0]}, ValueError, "one to 3 axes"),
        ({"window": 10}, ValueError, "window: got 10 with dilation 1 on axis 0"),
        ({"window": (3, 4), "dilation": (1, 3)}, ValueError, "window: got 4 with dilation 3 on axis 1"),
        ({"window": (3, 3, 3)}, ValueError, "window: got 3 numbers, expected 2"),
        ({"stride": 4}, ValueError, "stride: got 4 on axis 0"),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"causal": 2}, TypeError, "causal"),
    ):
        with pytest.raises(error, match=message):
            gpu.generalized_neighborhood_attention(**({"q": q, "k": k, "v": v, "window": 3} | change), device=device)
    assert not device.started
