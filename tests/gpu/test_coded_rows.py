"""Rows of 8-bit codes on a GPU: the codes of a `KVStore`, and decode steps over them."""

import numpy as np
import pytest

import longattn as la
import tolerances
from emu.device import EmulatorDevice
from gpu.conftest import get, put
from longattn import gpu
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F16, F32, qkv


def coded(device, rows):
    """Codes of rows on a device, and the numbers they stand for."""
    made = gpu.encode_rows(put(device, rows), device=device)
    codes, parameters = get(made.codes).astype(np.float64), get(made.parameters).astype(np.float64)
    return made, parameters[..., 1:] + parameters[..., :1] * codes


def arrays(rng, dtype, **shape):
    return qkv(rng, q_dtype=dtype, kv_dtype=dtype, **shape)


def check(device, q, k, v, **options):
    (keys, k_decoded), (values, v_decoded) = coded(device, k), coded(device, v)
    placed = {name: put(device, x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    out, lse = gpu.attention(put(device, q), keys, values, return_lse=True, device=device, **placed)
    expected, expected_lse = reference.attention(q, k_decoded, v_decoded, return_lse=True, **options)
    offset = np.max(options.get("alibi_slopes", 0.0)) * k.shape[2] + np.max(options.get("sinks", 0.0))
    tolerances.device_coded_attention(q, k_decoded, v_decoded, offset=offset).check(
        get(out), expected, get(lse), expected_lse
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_codes_are_those_of_a_store(rng, device, dtype, dim):
    rows = (rng.standard_normal((2, 23, dim)) * rng.uniform(0.01, 30, (2, 23, 1)) + 1).astype(dtype)
    store = la.KVStore(kv_heads=2, head_dim=dim, dtype="int8", capacity=64)
    store.append(rows, rows)
    _, decoded = coded(device, rows[None])
    scale, _, atol = tolerances.coded_rows(rows, 8)
    assert (np.abs(decoded[0] - rows.astype(np.float64)) <= scale / 2 + atol).all()
    # Where a quotient lies between two codes, one rounding decides.
    far = np.abs(decoded[0] - np.asarray(store.keys)) > atol
    assert far.mean() < 1e-3 and (np.abs(decoded[0] - np.asarray(store.keys)) <= scale + atol).all()


def test_rows_that_are_not_finite_become_nan(rng, device):
    rows = rng.standard_normal((1, 1, 5, 64)).astype(F32)
    rows[0, 0, 1, 7], rows[0, 0, 2, 3], rows[0, 0, 3] = np.nan, np.inf, 2.5
    _, decoded = coded(device, rows)
    assert (
        np.isnan(decoded[0, 0, 1:3]).all() and (decoded[0, 0, 3] == 2.5).all() and np.isfinite(decoded[0, 0, 4]).all()
    )


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 8])
def test_decode(rng, device, dtype, dim, group):
    check(device, *arrays(rng, dtype, batch=2, heads=2 * group, kv_heads=2, rows=1, keys=333, dim=dim), causal=True)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("keys", [1, 15, 17, 257, 700])
def test_ragged_lengths(rng, device, dtype, keys):
    check(device, *arrays(rng, dtype, heads=3, kv_heads=1, rows=1, keys=keys, dim=64))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_positions_windows_and_options(rng, device, dtype, dim):
    q, k, v = arrays(rng, dtype, heads=4, kv_heads=2, rows=5, keys=90, dim=dim)
    check(device, q, k, v, causal=True)
    check(device, q, k, v, window=(30, 1), sinks=np.array([0.5, 1, -1, 2], np.float32))
    check(device, q[:, :, :1], k, v, window=(30, 0), softcap=2.0, alibi_slopes=np.full(4, 0.1, np.float32))


def test_offsets_far_from_zero(rng, device):
    """Rows whose range is small beside their offset: the products are of the codes, not of the offsets."""
    q, k, v = arrays(rng, F16, heads=2, kv_heads=1, rows=1, keys=100, dim=64)
    check(device, q, k, v + np.float16(20))


def test_matrix_loads_meet_no_bank_twice(rng):
    for dim in (64, 128, 256):
        device = EmulatorDevice()
        q, k, v = arrays(rng, BF16, heads=1, kv_heads=1, rows=1, keys=90, dim=dim)
        gpu.attention(q, *(gpu.encode_rows(x, device=device) for x in (k, v)), device=device)
        loads, waits = device.matrix_loads
        assert loads > 0 and waits == 0


def test_bad_input(rng):
    device = EmulatorDevice()
    q, k, v = arrays(rng, F16, heads=2, kv_heads=1, rows=1, keys=20, dim=64)
    keys, values = (gpu.encode_rows(x, device=device) for x in (k, v))
    started = list(device.started)
    for given, error, message in (
        ((q, keys, v), TypeError, "v: got ndarray, expected CodedRows"),
        ((q.astype(F32), keys, values), TypeError, "q: got dtype float32 over coded keys"),
        ((np.repeat(q, 20, 2), keys, values), ValueError, "at most 16 rows per KV head"),
        ((q, gpu.CodedRows(keys.codes, keys.parameters[:, :, :5]), values), ValueError, "k: got codes"),
        ((q, gpu.CodedRows(keys.parameters, keys.codes), values), TypeError, "k: got codes float32"),
        ((q, keys.from_row(3), values), ValueError, "v: got shape"),
        ((q, gpu.CodedRows(keys.codes[..., ::-1], keys.parameters), values), ValueError, "row by row"),
    ):
        with pytest.raises(error, match=message):
            gpu.attention(*given, device=device)
    assert device.started == started
