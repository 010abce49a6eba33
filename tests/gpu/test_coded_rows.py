"""Rows of 8-bit codes on a GPU: the codes of a `KVStore`, and decode steps over them."""

import numpy as np
import pytest

import longattn as la
import tolerances
from emu.device import EmulatorDevice
from gpu.conftest import CPU, get, put
from gpu.test_attention import OPTIONS, as_taken, earlier, largest, placed
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


def check_anywhere(device, q, k, v, **options):
    """`check`, or on the CPU the same with codes of a store."""
    if device is not CPU:
        return check(device, q, k, v, **options)
    store = la.KVStore(kv_heads=k.shape[1], head_dim=k.shape[3], dtype="int8", capacity=k.shape[2])
    store.append(k[0], v[0])
    given = {name: _of_one(name, x) for name, x in options.items()}
    out, lse = la.attention(q[0], store.keys, store.values, return_lse=True, **given)
    decoded = [np.asarray(x)[None].astype(np.float64) for x in (store.keys, store.values)]
    return compare(q, *decoded, out[None], lse[None], options, on_cpu=True)


def _of_one(name, x):
    """An option of a batch of one without the batch."""
    if name in ("state", "segments"):
        return tuple(one[0] if name == "state" or one.ndim == 2 else one for one in x)
    return x[0] if name in ("mask", "bias") and x.ndim == 4 else x


def compare(q, k, v, out, lse, options, *, on_cpu=False):
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    offset = np.max(options.get("alibi_slopes", 0.0)) * k.shape[2] + np.max(options.get("sinks", 0.0))
    offset += largest(options.get("bias", np.zeros(1)))
    held = v
    if "state" in options:  # of which the output is a mean as well
        held = np.append(v.ravel(), np.nan_to_num(options["state"][0]))[None, :, None]
        offset += largest(options["state"][1])
    if on_cpu:  # where some instruction sets round queries to integers
        tolerance = tolerances.coded_attention(q, k[0], held[0], integers=True, offset=offset)
    else:
        tolerance = tolerances.device_coded_attention(q, k, held, offset=offset)
    tolerance.check(out, expected, lse, expected_lse)
    return out, lse


def check(device, q, k, v, **options):
    (keys, k_decoded), (values, v_decoded) = coded(device, k), coded(device, v)
    there = {name: placed(device, x) for name, x in options.items()}
    out, lse = gpu.attention(put(device, q), keys, values, return_lse=True, device=device, **there)
    return compare(q, k_decoded, v_decoded, get(out), get(lse), options)


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
@pytest.mark.parametrize("group", [1, 4, 8])
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


@pytest.mark.parametrize(("dtype", "dim", "rows"), [(F16, 64, 1), (BF16, 128, 3), (F16, 256, 2)])
def test_what_hides_keys_and_what_came_before(rng, anywhere, dtype, dim, rows):
    """On the CPU codes of a `KVStore`. Every second row sees nothing in one of them."""
    q, k, v = arrays(rng, dtype, heads=4, kv_heads=2, rows=rows, keys=70, dim=dim)
    for option in ("mask", "mask of all", "bias", "bias that hides", "segments", "visible until", "state"):
        options = {name: as_taken(x) for name, x in OPTIONS[option](rng, 1, 4, rows, 70).items()}
        if option == "state":
            options["state"] = tuple(map(as_taken, earlier(rng, 1, 4, rows, dim=dim)))
        check_anywhere(anywhere, q, k, v, **options)
    _, lse = check_anywhere(anywhere, q, k, v, mask=np.zeros((rows, 70), bool))
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (128, 4), (256, 8)])
def test_prefill(rng, device, dtype, dim, group):
    """More rows than a decode kernel takes read codes as numbers of the dtype: those of attention over these."""
    q, k, v = arrays(rng, dtype, batch=2, heads=2 * group, kv_heads=2, rows=70, keys=90, dim=dim)
    (keys, k_decoded), (values, v_decoded) = coded(device, k), coded(device, v)
    numbers = [x.astype(np.float32).astype(dtype) for x in (k_decoded, v_decoded)]
    sinks = rng.standard_normal(2 * group).astype(np.float32)
    for options in ({"causal": True}, {"window": (30, 5)}, {"softcap": 2.0, "sinks": sinks, "causal": True}):
        there = {name: placed(device, x) for name, x in options.items()}
        out, lse = gpu.attention(put(device, q), keys, values, return_lse=True, device=device, **there)
        expected, expected_lse = reference.attention(q, *numbers, return_lse=True, **options)
        # Where a number lies between two of the dtype, one rounding decides.
        tolerance = tolerances.device_attention(q, *numbers, offset=largest(sinks))
        tolerance.check(get(out), expected, get(lse), expected_lse)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_prefill_over_what_is_hidden(rng, device, dtype):
    """Codes of rows that hold NaN, which only some rows see."""
    q, k, v = arrays(rng, dtype, heads=1, kv_heads=1, rows=70, keys=70, dim=64)
    k[0, 0, 50, 3], v[0, 0, 60, 1] = np.nan, np.inf
    keys, values = (gpu.encode_rows(put(device, x), device=device) for x in (k, v))
    out = get(gpu.attention(put(device, q), keys, values, causal=True, device=device))
    numbers = (np.where(np.isfinite(x), x, 0).astype(dtype) for x in (q, k, v))
    clean = get(gpu.attention(*(put(device, x) for x in numbers), causal=True, device=device))[:, :, :50]
    assert np.isnan(out[0, 0, 50:]).all()
    error = np.abs(out[:, :, :50].astype(np.float32) - clean.astype(np.float32))
    assert error.max() < np.abs(clean.astype(np.float32)).max() / 16


@pytest.mark.parametrize("query_block", [64, 128])
@pytest.mark.parametrize(("dtype", "dim"), [(BF16, 64), (F16, 128)], ids=str)
def test_blocks_of_codes(rng, device, query_block, dtype, dim):
    """Lists that name every block are attention to all keys."""
    q, k, v = arrays(rng, dtype, heads=1, kv_heads=1, rows=130, keys=130, dim=dim)
    keys, values = (gpu.encode_rows(put(device, x), device=device) for x in (k, v))
    blocks = -(-130 // query_block)
    starts = (np.arange(blocks + 1, dtype=np.int32) * 3)[None, None]
    lists = starts, np.tile(np.arange(3, dtype=np.int32), blocks)
    found = gpu.block_sparse_attention(
        put(device, q), keys, values, *lists, query_block=query_block, causal=True, device=device
    )
    whole = gpu.attention(put(device, q), keys, values, causal=True, device=device)
    np.testing.assert_array_equal(get(found), get(whole))


def test_no_keys(rng, device):
    q, k, v = arrays(rng, F16, heads=4, kv_heads=2, rows=1, keys=0, dim=64)
    keys, values = (gpu.encode_rows(put(device, x), device=device) for x in (k, v))
    out, lse = gpu.attention(put(device, q), keys, values, return_lse=True, device=device)
    assert not get(out).any() and np.isneginf(get(lse)).all()


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
        ((q, gpu.CodedRows(keys.codes, keys.parameters[:, :, :5]), values), ValueError, "k: got codes"),
        ((q, gpu.CodedRows(keys.parameters, keys.codes), values), TypeError, "k: got codes float32"),
        ((q, keys.from_row(3), values), ValueError, "v: got shape"),
        ((q, gpu.CodedRows(keys.codes[..., ::-1], keys.parameters), values), ValueError, "row by row"),
    ):
        with pytest.raises(error, match=message):
            gpu.attention(*given, device=device)
    assert device.started == started
