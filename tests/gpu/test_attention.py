"""Attention against the float64 reference: one suite for the CPU's functions and those of `longattn.gpu`.

The latter run in the emulator, and on a GPU where there is one.
"""

import sys

import numpy as np
import pytest

import longattn as la
import tolerances
from emu import emulator
from emu.device import EmulatorDevice
from gpu.conftest import function_of, get, put, tolerance_of
from longattn import gpu
from longattn.dense._options import ON_GPU
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F16, F32, qkv


def check(device, q, k, v, **options):
    """Output and lse against the reference; returns them."""
    function = function_of(device, la.attention, gpu.attention)
    out, lse = function(*(put(device, x) for x in (q, k, v)), return_lse=True, **options)
    out, lse = get(out), get(lse)
    assert out.dtype == q.dtype and out.shape == q.shape and lse.dtype == np.float32
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    tolerance_of(device, q, k, v, scale=options.get("scale")).check(out, expected, lse, expected_lse)
    return out, lse


def arrays(rng, dtype, *, batch=1, **shape):
    return qkv(rng, batch=batch, q_dtype=dtype, kv_dtype=dtype, **shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_decode(rng, anywhere, dtype, dim, group):
    check(anywhere, *arrays(rng, dtype, batch=2, heads=2 * group, kv_heads=2, rows=1, keys=333, dim=dim), causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 255, 256, 257, 700])
def test_decode_of_ragged_lengths(rng, anywhere, dtype, keys):
    check(anywhere, *arrays(rng, dtype, heads=3, kv_heads=1, rows=1, keys=keys, dim=64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [128, 256])
def test_decode_of_ragged_lengths_of_wide_heads(rng, anywhere, dtype, dim):
    for keys in (1, 17, 65, 257):
        check(anywhere, *arrays(rng, dtype, heads=3, kv_heads=1, rows=1, keys=keys, dim=dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(2, 90), (5, 5), (4, 2), (3, 300)])
def test_decode_of_several_positions(rng, anywhere, dtype, rows, keys):
    """Rows before the first key see nothing: output 0, lse -inf."""
    _, lse = check(anywhere, *arrays(rng, dtype, heads=6, kv_heads=2, rows=rows, keys=keys, dim=64), causal=True)
    assert np.isneginf(lse[:, :, : max(rows - keys, 0)]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_prefill(rng, anywhere, dtype, dim, group):
    """Rows before the first key see nothing."""
    arrays_ = arrays(rng, dtype, heads=group, kv_heads=1, rows=70, keys=37, dim=dim)
    _, lse = check(anywhere, *arrays_, causal=True)
    assert np.isneginf(lse[:, :, :33]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_prefill_over_all_keys(rng, anywhere, dtype, dim):
    check(anywhere, *arrays(rng, dtype, heads=2, kv_heads=1, rows=70, keys=100, dim=dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(17, 17), (64, 64), (129, 129), (65, 200), (200, 65)])
def test_prefill_of_ragged_lengths(rng, anywhere, dtype, rows, keys):
    check(anywhere, *arrays(rng, dtype, heads=1, kv_heads=1, rows=rows, keys=keys, dim=64), causal=True)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("window", [(20, 0), (0, 0), (70, 5), (-1, 30), (3, -1)])
def test_window(rng, anywhere, dtype, window):
    check(anywhere, *arrays(rng, dtype, heads=2, kv_heads=1, rows=90, keys=130, dim=64), window=window)
    check(anywhere, *arrays(rng, dtype, heads=2, kv_heads=1, rows=1, keys=130, dim=64), window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(rng, anywhere, dtype):
    check(anywhere, *arrays(rng, dtype, heads=2, kv_heads=2, rows=1, keys=64, dim=64), scale=0.5)
    check(anywhere, *arrays(rng, dtype, heads=2, kv_heads=2, rows=33, keys=64, dim=64), scale=0.02)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(rng, anywhere, dtype, scale):
    """The smallest product has the largest score, or all have the same."""
    for rows in (1, 70):
        given = arrays(rng, dtype, heads=2, kv_heads=1, rows=rows, keys=130, dim=64)
        check(anywhere, *given, scale=scale, causal=True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_no_keys_and_no_rows(rng, device, dtype, rows):
    q, k, v = arrays(rng, dtype, heads=2, kv_heads=1, rows=rows, keys=0, dim=64)
    out, lse = gpu.attention(*(put(device, x) for x in (q, k, v)), return_lse=True, device=device)
    assert (get(out) == 0).all() and np.isneginf(get(lse)).all()
    empty = put(device, q[:, :, :0])
    assert gpu.attention(empty, put(device, k), put(device, v), device=device).shape == (1, 2, 0, 64)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("rows", [1, 30])
def test_strides_are_read_in_place(rng, device, dtype, rows):
    """Heads last, as flash-attn lays them, and rows of a longer array."""
    q, k, v = arrays(rng, dtype, heads=2, kv_heads=2, rows=rows, keys=77, dim=64)
    wide = np.zeros((1, 77, 2, 128), k.dtype)
    wide[..., :64], wide[..., 64:] = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    both = put(device, wide)
    heads_first = both.transpose(0, 2, 1, 3)
    out = gpu.attention(put(device, q), heads_first[..., :64], heads_first[..., 64:], causal=True, device=device)
    plain = gpu.attention(*(put(device, x) for x in (q, k, v)), causal=True, device=device)
    np.testing.assert_array_equal(get(out), get(plain))


def test_matrix_loads_meet_no_bank_twice(rng):
    """Tiles are laid out so that the eight rows of a matrix load lie in different banks."""
    if not emulator.available():
        pytest.skip("the emulator needs g++ on x86-64")
    for dim in (64, 128, 256):
        for rows in (1, 40):
            device = EmulatorDevice()
            q, k, v = arrays(rng, BF16, heads=1, kv_heads=1, rows=rows, keys=90, dim=dim)
            gpu.attention(q, k, v, device=device)
            loads, waits = device.matrix_loads
            assert loads > 0 and waits == 0


def earlier(rng, *shape, dim=64):
    """What a part over other keys left; every third row saw none, and its output says nothing."""
    o, lse = rng.standard_normal((*shape, dim)), rng.standard_normal(shape)
    o[..., ::3, :], lse[..., ::3] = np.nan, -np.inf
    return o, lse


OPTIONS = {
    "softcap": lambda rng, b, h, n, m: {"softcap": 0.7},
    "sinks": lambda rng, b, h, n, m: {"sinks": rng.standard_normal(h)},
    "alibi": lambda rng, b, h, n, m: {"alibi_slopes": rng.uniform(0, 0.5, h)},
    "alibi by sequence": lambda rng, b, h, n, m: {"alibi_slopes": rng.uniform(0, 0.5, (b, h))},
    "bias": lambda rng, b, h, n, m: {"bias": rng.standard_normal((b, h, n, m))},
    "bias by key": lambda rng, b, h, n, m: {"bias": rng.standard_normal((b, 1, 1, m))},
    "bias that hides": lambda rng, b, h, n, m: {"bias": np.where(rng.random((h, n, m)) < 0.7, -np.inf, 0.5)},
    "scale by head": lambda rng, b, h, n, m: {"scale": rng.uniform(0.05, 0.2, h)},
    "scale by row": lambda rng, b, h, n, m: {"scale": rng.uniform(0.05, 0.2, (b, h, n))},
    "mask": lambda rng, b, h, n, m: {"mask": rng.random((b, h, n, m)) < 0.6},
    "mask by key": lambda rng, b, h, n, m: {"mask": rng.random((b, 1, 1, m)) < 0.6},
    "mask of all": lambda rng, b, h, n, m: {"mask": (np.arange(n) % 2 > 0)[:, None]},
    "segments": lambda rng, b, h, n, m: {
        "segments": (rng.integers(0, 3, n).astype(np.int32), rng.integers(0, 3, (b, m)).astype(np.int32))
    },
    "visible until": lambda rng, b, h, n, m: {"visible_until": rng.integers(0, m + 20, m).astype(np.int32)},
    "relative bias": lambda rng, b, h, n, m: {"relative_bias": rng.standard_normal((h, 40)), "causal": True},
    "state": lambda rng, b, h, n, m: {"state": earlier(rng, b, h, n), "window": (30, -1)},
    "all that hides": lambda rng, b, h, n, m: {
        "mask": rng.random((n, m)) < 0.7,
        "segments": (rng.integers(0, 2, (b, n)).astype(np.int32), rng.integers(0, 2, m).astype(np.int32)),
        "visible_until": rng.integers(0, m + 20, (b, m)).astype(np.int32),
        "relative_bias": rng.standard_normal((h, 33)),
        "relative_zero": 15,
        "state": earlier(rng, b, h, n),
        "window": (50, 0),
    },
    "all, in a window": lambda rng, b, h, n, m: {
        "softcap": 2.0,
        "sinks": rng.standard_normal(h),
        "alibi_slopes": rng.uniform(0, 0.5, h),
        "bias": rng.standard_normal((h, n, m)),
        "scale": rng.uniform(0.05, 0.2, (h, n)),
        "window": (60, 0),
    },
}


def as_taken(x):
    """An option's arrays as a GPU takes them."""
    if isinstance(x, tuple):
        return tuple(map(as_taken, x))
    return x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x


def placed(device, x):
    if isinstance(x, tuple):
        return tuple(placed(device, one) for one in x)
    return put(device, x) if isinstance(x, np.ndarray) else x


def largest(x):
    """Largest magnitude of a number among NaN and infinities."""
    return np.abs(x[np.isfinite(x)]).max(initial=0.0)


ATTENTION = (la.attention, gpu.attention, reference.attention)
VARLEN = (la.attention_varlen, gpu.attention_varlen, reference.attention_varlen)


def check_options(device, q, k, v, options, *, functions=ATTENTION, bounds=()):
    *both, oracle = functions
    options = {name: as_taken(x) for name, x in options.items()}
    there = {name: placed(device, x) for name, x in options.items()}
    out, lse = function_of(device, *both)(*(put(device, x) for x in (q, k, v)), *bounds, return_lse=True, **there)
    expected, expected_lse = oracle(q, k, v, *bounds, return_lse=True, **options)
    distance = np.max(options.get("alibi_slopes", 0.0)) * max(q.shape[-2], k.shape[-2], len(q), len(k))
    offset = distance + np.max(options.get("sinks", 0.0))
    offset += sum(largest(options[name]) for name in ("bias", "relative_bias") if name in options)
    scale = options.get("scale")
    scale = None if scale is None else float(np.max(scale))
    held = v
    if "state" in options:  # of which the output is a mean as well
        held = np.append(v.astype(np.float64).ravel(), np.nan_to_num(options["state"][0])).astype(v.dtype)[:, None]
        offset += largest(options["state"][1])
    together = int(q.shape[-2] // k.shape[-2] * np.diff(bounds[0]).max()) if bounds else None
    tolerance = tolerance_of(device, q, k, held, scale=scale, offset=offset, together=together)
    tolerance.check(get(out), expected, get(lse), expected_lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_scores(rng, anywhere, dtype, rows, option):
    q, k, v = arrays(rng, dtype, batch=2, heads=4, kv_heads=2, rows=rows, keys=90, dim=64)
    check_options(anywhere, q, k, v, OPTIONS[option](rng, 2, 4, rows, 90))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("rows", [1, 20])
def test_options_with_other_head_sizes(rng, anywhere, dtype, dim, rows):
    q, k, v = arrays(rng, dtype, heads=2, kv_heads=1, rows=rows, keys=300, dim=dim)
    check_options(anywhere, q, k, v, OPTIONS["all, in a window"](rng, 1, 2, rows, 300))
    state = {"state": earlier(rng, 1, 2, rows, dim=dim), "mask": rng.random((rows, 300)) < 0.5}
    check_options(anywhere, q, k, v, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("option", ["causal", "mask"])
def test_what_is_hidden_holds_anything(rng, anywhere, dtype, dim, rows, option):
    """NaN and infinities count for the rows that see them, and for no others."""
    q, k, v = arrays(rng, dtype, batch=2, heads=2, kv_heads=1, rows=rows, keys=50, dim=dim)
    k[0, :, 48], v[0, :, 49], v[1, 0, 48, 5], k[1, :, 49] = np.nan, np.nan, np.inf, np.nan
    mask = rng.random((2, 1, rows, 50)) < 0.5
    options = {"causal": True} if option == "causal" else {"mask": mask}
    there = {name: placed(anywhere, x) for name, x in options.items()}
    function = function_of(anywhere, la.attention, gpu.attention)
    out, lse = function(*(put(anywhere, x) for x in (q, k, v)), return_lse=True, **there)
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    clean = [np.where(np.isfinite(x), x, 0) for x in (k, v)]
    tolerance_of(anywhere, q, *clean).check(get(out), expected, get(lse), expected_lse)
    assert np.isnan(get(out)).any() and np.isfinite(get(out)).any()


def test_a_bias_by_key_is_read_by_any_strides(rng, device):
    q, k, v = arrays(rng, F32, heads=2, kv_heads=1, rows=1, keys=90, dim=64)
    bias = rng.standard_normal((90, 2)).astype(np.float32)
    there = put(device, bias).T[None, :, None]
    out = gpu.attention(*(put(device, x) for x in (q, k, v)), bias=there, window=(50, 0), device=device)
    expected = reference.attention(q, k, v, bias=bias.T[None, :, None], window=(50, 0))
    tolerances.device_attention(q, k, v, offset=4.0).check(get(out), expected)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_a_sink_is_all_that_a_row_without_keys_sees(rng, device, dtype, rows):
    q, k, v = arrays(rng, dtype, heads=2, kv_heads=1, rows=rows, keys=0, dim=64)
    sinks = np.array([0.5, -2.0], np.float32)
    out, lse = gpu.attention(
        *(put(device, x) for x in (q, k, v)), sinks=put(device, sinks), return_lse=True, device=device
    )
    assert (get(out) == 0).all()
    np.testing.assert_allclose(get(lse), np.broadcast_to(sinks[None, :, None], get(lse).shape), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (20, 3)])
def test_packed_sequences(rng, anywhere, dtype, window):
    """Lengths from none to more than a block, fewer keys than rows among them."""
    q_ends, k_ends = np.array([0, 1, 1, 71, 201, 206]), np.array([0, 90, 95, 165, 225, 225])
    q = rng.standard_normal((206, 2, 64)).astype(dtype)
    k, v = (rng.standard_normal((225, 1, 64)).astype(dtype) for _ in "kv")
    o, lse = earlier(rng, 2, 206)
    many = {"softcap": 3.0, "alibi_slopes": rng.uniform(0, 0.1, 2), "sinks": rng.standard_normal(2)}
    carried = {"relative_bias": rng.standard_normal((2, 50)), "state": (o.swapaxes(0, 1), lse)}
    for options in ({}, many, carried):
        check_options(
            anywhere,
            q,
            k,
            v,
            {"causal": True, "window": window, **options},
            functions=VARLEN,
            bounds=(q_ends, k_ends),
        )


def test_packed_sequences_of_one_length_are_a_batch(rng, device):
    q, k, v = (put(device, x) for x in arrays(rng, BF16, batch=3, heads=2, kv_heads=2, rows=40, keys=40, dim=64))
    packed = [put(device, np.ascontiguousarray(get(x).swapaxes(1, 2)).reshape(120, 2, 64)) for x in (q, k, v)]
    ends = np.arange(4) * 40
    out = get(gpu.attention_varlen(*packed, put(device, ends), ends, causal=True, device=device))
    plain = get(gpu.attention(q, k, v, causal=True, device=device))
    np.testing.assert_array_equal(out.reshape(3, 40, 2, 64).swapaxes(1, 2), plain)


def test_a_window_is_not_read_beyond(rng):
    """Of a decode step in a window, the blocks of keys before it are not started."""
    device = EmulatorDevice(processors=64)
    q, k, v = arrays(rng, F32, heads=2, kv_heads=2, rows=1, keys=3000, dim=64)
    k[:, :, :2400], v[:, :, :2400] = np.nan, np.nan
    assert np.isfinite(gpu.attention(q, k, v, window=(500, 0), device=device)).all()


class TestBadInput:
    def test_options(self, rng):
        q, k, v = arrays(rng, F32, heads=2, kv_heads=2, rows=3, keys=8, dim=64)
        device = EmulatorDevice()
        for option, error, message in (
            ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
            ({"scale": np.zeros(3, np.float32)}, ValueError, r"scale: got shape \(3,\)"),
            ({"scale": np.inf}, ValueError, "scale: got inf"),
            ({"bias": np.zeros((2, 3, 7), np.float32)}, ValueError, r"bias: got shape \(2, 3, 7\)"),
            ({"bias": np.zeros((3, 8))}, TypeError, "bias: got dtype float64"),
            ({"alibi_slopes": np.zeros(3, np.float32)}, ValueError, "alibi_slopes: got shape"),
            ({"sinks": np.zeros((1, 2), np.float32)}, ValueError, "sinks: got shape"),
            ({"sinks": [0.0, 0.0]}, TypeError, "sinks: got list"),
            ({"mask": np.zeros((3, 8), np.float32)}, TypeError, "mask: got dtype float32, expected bool"),
            ({"mask": np.zeros((2, 8), bool)}, ValueError, r"mask: got shape \(2, 8\)"),
            ({"relative_bias": np.zeros((3, 8), np.float32)}, ValueError, r"relative_bias: got shape \(3, 8\)"),
            ({"relative_zero": 2}, ValueError, "relative_zero: got 2 without relative_bias"),
            (
                {"relative_bias": np.zeros((2, 4), np.float32), "relative_zero": 4},
                ValueError,
                "relative_zero: got 4, expected an entry of the table, 0 to 3",
            ),
            ({"segments": np.zeros(3, np.int32)}, TypeError, "segments: got ndarray, expected a pair"),
            (
                {"segments": (np.zeros(3, np.int32), np.zeros(8))},
                TypeError,
                r"segments\[1\]: got dtype float64, expected int32",
            ),
            (
                {"segments": (np.zeros(4, np.int32), np.zeros(8, np.int32))},
                ValueError,
                r"segments\[0\]: got shape \(4,\), expected \(3,\) or \(1, 3\)",
            ),
            ({"visible_until": np.zeros((2, 8), np.int32)}, ValueError, "visible_until: got shape"),
            ({"state": np.zeros(3, np.float32)}, TypeError, "state: got ndarray, expected a pair"),
            (
                {"state": (np.zeros((1, 2, 3, 32), np.float32), np.zeros((1, 2, 3), np.float32))},
                ValueError,
                "state o: got shape",
            ),
            (
                {"state": (np.zeros((1, 2, 3, 64), np.float32), np.zeros((1, 2, 4), np.float32))},
                ValueError,
                "state lse: got shape",
            ),
        ):
            with pytest.raises(error, match=message):
                gpu.attention(q, k, v, device=device, **option)
        packed, ends = [x[0].swapaxes(0, 1) for x in (q, k, v)], (np.array([0, 3]), np.array([0, 8]))
        with pytest.raises(ValueError, match="cu_seqlens_q: got bounds from 0 to 2"):
            gpu.attention_varlen(*packed, np.array([0, 2]), ends[1], device=device)
        with pytest.raises(ValueError, match="cu_seqlens_k: got 2 sequences"):
            gpu.attention_varlen(*packed, ends[0], np.array([0, 4, 8]), device=device)
        with pytest.raises(ValueError, match=r"scale: got shape \(2, 3\)"):
            gpu.attention_varlen(*packed, *ends, scale=np.zeros((2, 3), np.float32), device=device)
        assert not device.started

    def test_arrays_of_no_gpu(self, rng):
        q, k, v = arrays(rng, F32, heads=1, kv_heads=1, rows=1, keys=8, dim=64)
        with pytest.raises(TypeError, match=r"q: got numpy.ndarray, expected a CuPy array or a torch CUDA tensor"):
            gpu.attention(q, k, v)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda q, k, v: (q.astype(np.float64), k, v), TypeError, "q: got dtype float64"),
            (lambda q, k, v: (q, k.astype(F16), v), TypeError, "k: got dtype float16, expected float32"),
            (lambda q, k, v: (q[0], k, v), ValueError, r"q: got shape \(2, 3, 64\)"),
            (lambda q, k, v: (q[..., :40], k[..., :40], v[..., :40]), ValueError, "head_dim 40, expected one of"),
            (lambda q, k, v: (q, k[..., :7, :], v), ValueError, "v: got shape"),
            (
                lambda q, k, v: (np.concatenate([q, q[:, :1]], 1), k, v),
                ValueError,
                "k: got 2 heads, expected a divisor",
            ),
            (lambda q, k, v: (np.concatenate([q, q]), k, v), ValueError, "k: got shape"),
        ],
    )
    def test_arrays_that_do_not_fit(self, rng, change, error, message):
        arrays_ = change(*arrays(rng, F32, heads=2, kv_heads=2, rows=3, keys=8, dim=64))
        with pytest.raises(error, match=message):
            gpu.attention(*arrays_, device=EmulatorDevice())

    def test_window(self, rng):
        q, k, v = arrays(rng, F32, heads=2, kv_heads=2, rows=1, keys=8, dim=64)
        device = EmulatorDevice()
        with pytest.raises(ValueError, match="window"):
            gpu.attention(q, k, v, window=(-2, 0), device=device)
        assert not device.started


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_head_sizes_and_shared_memory(rng, dtype, rows):
    """A device with 99 KB a block, as consumer cards have, takes heads of 128; what it cannot take it refuses first."""
    device = EmulatorDevice()
    device.shared_limit = 99 << 10
    gpu.attention(*arrays(rng, dtype, heads=1, kv_heads=1, rows=rows, keys=20, dim=128), device=device)
    if (dtype, rows) == (F32, 1):  # needs little
        return
    device = EmulatorDevice()
    device.shared_limit = 50 << 10
    with pytest.raises(ValueError, match="bytes of shared memory a block; this device has 51200"):
        gpu.attention(*arrays(rng, dtype, heads=1, kv_heads=1, rows=rows, keys=20, dim=256), device=device)
    assert not device.started


class TestPublicFunctions:
    """`longattn.attention` on arrays of a GPU: the option table says what goes there."""

    @pytest.fixture
    def on_gpu(self, monkeypatch):
        """Numpy arrays count as a GPU's; what reaches its functions."""
        seen = []
        for module, name in (("attention", "attention_on_gpu"), ("attention_varlen", "attention_varlen_on_gpu")):
            there = f"longattn.dense.{module}"
            monkeypatch.setattr(sys.modules[there], "is_on_gpu", lambda x: True)
            monkeypatch.setattr(sys.modules[there], name, lambda *arrays, **options: seen.append(options))
        return seen

    def test_offered_options_are_passed_on(self, rng, on_gpu):
        q, k, v = arrays(rng, F32, heads=2, kv_heads=2, rows=3, keys=8, dim=64)
        slopes, sinks = np.zeros(2), np.zeros(2)
        of_scores = {
            "bias": np.zeros((3, 8)),
            "mask": np.ones((3, 8), bool),
            "segments": (np.zeros(3, int), np.zeros(8, int)),
            "visible_until": np.full(8, 3),
        }
        options = {
            "causal": True,
            "window": (3, 0),
            "scale": 0.3,
            "softcap": 2.0,
            "alibi_slopes": slopes,
            "sinks": sinks,
            "relative_bias": np.zeros((2, 4)),
            "relative_zero": 1,
            "state": (np.zeros((1, 2, 3, 64)), np.zeros((1, 2, 3))),
        }
        la.attention(q, k, v, return_lse=True, **options, **of_scores)
        la.attention_varlen(*(x[0].swapaxes(0, 1) for x in (q, k, v)), np.array([0, 3]), np.array([0, 8]), **options)
        assert set(on_gpu[0]) == ON_GPU | {"return_lse"}
        assert on_gpu[0] == {**options, **of_scores, "return_lse": True}
        assert on_gpu[1] == {**options, "return_lse": False}

    @pytest.mark.parametrize(
        "option",
        [
            {"skip_threshold": 0.1},
            {"qk_int8": True},
            {"out": np.zeros((1, 2, 3, 64))},
        ],
        ids=lambda option: next(iter(option)),
    )
    def test_others_are_refused_by_name(self, rng, on_gpu, option):
        q, k, v = arrays(rng, F32, heads=2, kv_heads=2, rows=3, keys=8, dim=64)
        with pytest.raises(ValueError, match=f"{next(iter(option))}: not offered for arrays of a GPU"):
            la.attention(q, k, v, **option)
        assert not on_gpu
