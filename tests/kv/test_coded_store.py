"""Stores of codes: rows decode as their definition says, whichever way they came in."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tolerances
from longattn import _core
from longattn.kv import KVStore
from longattn.reference.kv import coded_rows as reference
from random_arrays import LAYOUTS, lay, normal
from random_stores import rows, store_of

BITS = {"int8": 8, "int4": 4}
DIMS = [1, 5, 31, 32, 33, 64, 80, 128, 192]
GROUPS = [None, 32, 64, 128, 256, 1 << 40]
STEP = 2 << 20


def decoded(store):
    return np.asarray(store.keys), np.asarray(store.values)


def same(a, b):
    """Whether two stores hold the same rows to the last bit."""
    pairs = zip(decoded(a), decoded(b), strict=True)
    return len(a) == len(b) and all(np.array_equal(x.view(np.uint32), y.view(np.uint32)) for x, y in pairs)


def check(actual, x, bits, group_size=None, channels=None):
    """Compare decoded rows with the oracle, and with what they were coded from.

    A code may be its neighbour where the number lies within rounding of the border between the two. Returns the share
    of numbers for which that was allowed.
    """
    factors = None if channels is None else np.asarray(channels)[:, None]
    scale, slack, atol = tolerances.coded_rows(x, bits, group_size, factors)
    expected = reference.coded(x, bits, group_size, channels)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    off = np.abs(actual - expected)
    # How far the number is from the nearest border, which lies half a code from each.
    from_border = 0.5 - np.abs(np.asarray(x, np.float64) - expected) / np.where(scale == 0, 1, scale)
    near = from_border <= slack
    assert (off[~near] <= atol[~near]).all()
    assert (off <= np.ceil(np.minimum(slack, 2**bits)) * scale + atol).all()
    assert (np.abs(actual - np.asarray(x, np.float64)) <= (0.5 + np.minimum(slack, 2**bits)) * scale + atol).all()
    return (near & (scale > 0)).mean()


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_rows_decode_as_the_oracle(rng, isa, dim, dtype):
    value_dim = {1: 5, 64: 33, 128: 80}.get(dim, dim)
    keys, values = rows(rng, 2, 40, dim, value_dim)
    for group_size in GROUPS:
        store = store_of(keys, values, dtype, group_size=group_size)
        effective = None if group_size is None or group_size >= dim else group_size
        assert check(np.asarray(store.keys), keys, BITS[dtype], effective) < 0.01
        effective = None if group_size is None or group_size >= value_dim else group_size
        assert check(np.asarray(store.values), values, BITS[dtype], effective) < 0.01


@pytest.mark.parametrize("dtype", BITS)
def test_halves_round_up_and_the_grid_is_exact(isa, dtype):
    largest = 2 ** BITS[dtype] - 1
    row = np.float32([0, largest, 0.5, 1.5, 2.5, 2.25, 2.75, largest - 0.5])
    codes = [0, largest, 1, 2, 3, 2, 3, largest]
    for scale, steps in [(1, 0), (0.25, -2), (2.0**100, 8), (2.0**-100, 0)]:
        offset = scale * steps * largest
        x = np.broadcast_to(scale * row + np.float32(offset), (1, 3, 8)).astype(np.float32)
        store = store_of(x, x, dtype)
        expected = np.broadcast_to(scale * np.float32(codes) + np.float32(offset), (1, 3, 8))
        np.testing.assert_array_equal(store.keys, expected)
        np.testing.assert_array_equal(store.values, expected)
        again = store_of(np.asarray(store.keys), np.asarray(store.values), dtype)
        assert same(store, again)


def test_the_codes_themselves(rng, isa, tmp_path):
    """Bytes as documented: codes padded to 32 channels, two of 4 bits in a byte, then scales and offsets."""
    for dtype, dim, group_size in [("int8", 80, 32), ("int4", 80, 32), ("int4", 100, None), ("int8", 33, None)]:
        keys, values = rows(rng, 2, 30, dim)
        store = store_of(keys, values, dtype, group_size=group_size)
        store.save(tmp_path / "store")
        data = (tmp_path / "store").read_bytes()
        padded, bits = -(-dim // 32) * 32, BITS[dtype]
        groups = 1 if group_size is None else -(-dim // group_size)
        width = padded * bits // 8 + 8 * groups
        assert store.keys.nbytes == store.values.nbytes == 2 * 30 * width
        stored = np.frombuffer(data[-2 * store.keys.nbytes :], np.uint8).reshape(2, 2, 30, width)[0]
        codes, parameters = stored[..., : -8 * groups], stored[..., -8 * groups :].copy().view(np.float32)
        if bits == 4:
            runs = codes.reshape(2, 30, -1, 16)
            codes = np.concatenate([runs & 15, runs >> 4], axis=-1).reshape(2, 30, padded)
        assert (codes[..., dim:] == 0).all()
        scales, offsets = parameters[..., 0::2], parameters[..., 1::2]
        expected, expected_scales, expected_offsets = reference.encode(keys, bits, group_size)
        np.testing.assert_array_equal(offsets, expected_offsets)
        np.testing.assert_allclose(scales, expected_scales, rtol=1e-6)
        apart = codes[..., :dim] != expected
        _, slack, _ = tolerances.coded_rows(keys, bits, group_size)
        assert (np.abs(codes[..., :dim].astype(int) - expected)[apart] == 1).all() and apart.mean() < slack.max()
        again = reference.decode(codes[..., :dim], scales, offsets, group_size)
        np.testing.assert_array_equal(np.asarray(store.keys), again.astype(np.float32))


@pytest.mark.parametrize("dtype", BITS)
@settings(max_examples=20)
@given(
    chunks=st.lists(st.integers(0, 9), max_size=6),
    group_size=st.sampled_from([None, 32]),
    channel_scales=st.booleans(),
    heads_last=st.booleans(),
)
def test_pieces_are_one_append(dtype, chunks, group_size, channel_scales, heads_last):
    rng = np.random.default_rng(len(chunks))
    count, first = sum(chunks), next((n for n in chunks if n), 0)
    keys, values = normal(rng, (2, count, 40)), normal(rng, (2, count, 33))
    # The factors come from the first rows, here and there.
    scales = channel_scales and first > 0 and reference.channel_scales(keys[:, :first])
    options = {"group_size": group_size, "channel_scales": scales}
    whole = store_of(keys, values, dtype, **options)
    store, start = KVStore(2, 40, 33, dtype, 60, group_size=group_size, channel_scales=channel_scales), 0
    for n in chunks:
        k, v = keys[:, start : start + n], values[:, start : start + n]
        store.append(lay(k, "blhd") if heads_last else k, v[None])
        start += n
        assert len(store) == start and store.keys.shape == (2, start, 40) and store.values.shape == (2, start, 33)
    assert same(store, whole)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BITS)
def test_layouts(rng, isa, layout, dtype):
    k, v = normal(rng, (3, 7, 40), layout=layout), normal(rng, (3, 7, 5), layout=layout)
    whole = store_of(np.ascontiguousarray(k), np.ascontiguousarray(v), dtype)
    assert same(store_of(k, v, dtype), whole)


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("dtype", BITS)
def test_source_dtypes(rng, isa, source, dtype):
    """Rows are coded from the numbers that they are, and keys and values need not have one dtype."""
    k, v = normal(rng, (2, 9, 40), source), normal(rng, (2, 9, 33))
    store = store_of(k, v, dtype)
    assert same(store, store_of(k.astype(np.float32), v, dtype))
    check(np.asarray(store.keys), k.astype(np.float64), BITS[dtype])


def test_torch_rows(rng):
    torch = pytest.importorskip("torch")
    k = torch.from_numpy(normal(rng, (1, 6, 2, 40)))
    for source in (torch.float32, torch.float16, torch.bfloat16):
        rows = k.to(source).transpose(1, 2)
        numbers = rows.float().numpy()[0]
        for dtype in BITS:
            assert same(store_of(rows[0], rows[0], dtype), store_of(numbers, numbers, dtype))
    with pytest.raises(ValueError, match=r"^v: .*meta"):
        store_of(numbers, numbers, "int8").append(k.transpose(1, 2), k.transpose(1, 2).to("meta"))


@pytest.mark.parametrize("dtype", BITS)
def test_a_large_append_is_spread_over_heads(rng, dtype):
    count, dim = 45_000, 64
    keys = np.tile(normal(rng, (3, 900, dim)), (1, 50, 1))
    store = KVStore(3, dim, dtype=dtype, capacity=count)
    store.append(keys, keys[:, ::-1])
    part = store_of(keys[:, :900], keys[:, :900], dtype)
    np.testing.assert_array_equal(np.asarray(store.keys), np.tile(np.asarray(part.keys), (1, 50, 1)))
    np.testing.assert_array_equal(np.asarray(store.values)[:, ::-1], np.asarray(store.keys))


@pytest.mark.parametrize("dtype", BITS)
def test_truncate_and_append_again(rng, dtype):
    keys, values = rows(rng, 2, 30, 40, 33)
    store = store_of(keys, values, dtype, channel_scales=True)
    scales = store.channel_scales
    store.truncate(11)
    store.append(keys[:, 20:], values[:, 20:])
    kept = [np.concatenate([x[:, :11], x[:, 20:]], axis=1) for x in (keys, values)]
    assert same(store, store_of(*kept, dtype, channel_scales=scales))
    store.clear()
    assert store.keys.shape == np.asarray(store.keys).shape == (2, 0, 40)
    store.append(7 * keys, values)
    np.testing.assert_array_equal(store.channel_scales, scales)
    assert same(store, store_of(7 * keys, values, dtype, channel_scales=scales))


@pytest.mark.parametrize("channel_scales", [False, True])
@pytest.mark.parametrize("dtype", BITS)
def test_fork_shares_nothing(rng, dtype, channel_scales):
    keys, values = rows(rng, 2, 30, 40, 33)
    store = store_of(keys, values, dtype, group_size=32, channel_scales=channel_scales)
    fork, before = store.fork(), decoded(store)
    store.truncate(10)
    store.append(values[:, :5].repeat(2, -1)[..., :40], values[:, :5])
    for actual, expected in zip(decoded(fork), before, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert (fork.dtype, fork.capacity, len(fork), len(store)) == (dtype, store.capacity, 30, 15)
    fork.append(keys, values)
    for actual, expected in zip(decoded(fork), before, strict=True):
        np.testing.assert_array_equal(actual, np.concatenate([expected, expected], axis=1))


@pytest.mark.parametrize("dtype", BITS)
def test_a_fork_before_the_first_rows_finds_its_own_factors(rng, dtype):
    keys, values = rows(rng, 2, 30, 40, 33)
    store = KVStore(2, 40, 33, dtype, 100, channel_scales=True)
    fork = store.fork()
    store.append(keys, values)
    assert fork.channel_scales is None
    fork.append(2 * keys, values)
    np.testing.assert_array_equal(fork.channel_scales, 2 * store.channel_scales)


@pytest.mark.parametrize("dtype", BITS)
def test_channel_scales(rng, isa, dtype):
    keys, values = rows(rng, 2, 50, 40, 33)
    keys *= np.geomspace(1e-3, 1e3, 40, dtype=np.float32)
    keys[1, :, 7] = 0
    store = KVStore(2, 40, 33, dtype, 100, group_size=32, channel_scales=True)
    store.append(keys[:, :0], values[:, :0])
    assert store.channel_scales is None, "no rows, no factors"
    store.append(keys[:, :20], values[:, :20])
    store.append(keys[:, 20:], values[:, 20:])
    scales = store.channel_scales
    np.testing.assert_array_equal(scales, reference.channel_scales(keys[:, :20]))
    assert scales.dtype == np.float32 and scales[1, 7] == 1
    check(np.asarray(store.keys), keys, BITS[dtype], 32, scales)
    check(np.asarray(store.values), values, BITS[dtype], 32)  # values are coded as they are
    plain = store_of(keys, values, dtype, group_size=32)
    assert plain.channel_scales is None
    relative = [(np.abs(np.asarray(s.keys) - keys).mean(axis=1) / scales)[0] for s in (store, plain)]
    assert relative[0].max() < 2 ** -BITS[dtype] < relative[1].max() / 4, "small channels keep their precision"
    # The same factors given beforehand, in any floating dtype and layout.
    for factors in (scales, scales.astype(np.float64), np.asfortranarray(scales)):
        again = store_of(keys, values, dtype, group_size=32, channel_scales=factors)
        assert same(again, store)
        np.testing.assert_array_equal(again.channel_scales, scales)


def test_channel_scales_of_odd_rows():
    keys = np.ones((1, 3, 6), np.float32)
    keys[0, 1] = [np.nan, np.inf, -np.inf, 1e-40, -3e38, -2]
    keys[0, ::2, 3] = 0
    store = store_of(keys, keys, "int8", channel_scales=True)
    expected = np.float32([[1, 1, 1, 1e-30, 1e30, 2]])
    np.testing.assert_array_equal(store.channel_scales, expected)
    np.testing.assert_array_equal(np.float32(reference.channel_scales(keys)), expected)
    assert np.isfinite(np.asarray(store.keys)[:, ::2]).all() and np.isnan(np.asarray(store.keys)[:, 1]).all()


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_make_their_group_nan(rng, isa, dtype, bad):
    keys, values = rows(rng, 2, 8, 80, 40)
    for group_size, spoilt in [(32, slice(32, 64)), (64, slice(0, 64)), (None, slice(0, 80))]:
        k, v = keys.copy(), values.copy()
        k[1, 3, 40], v[0, 7, 39] = bad, bad
        store = store_of(k, v, dtype, group_size=group_size)
        expected = np.zeros(k.shape, bool)
        expected[1, 3, spoilt] = True
        np.testing.assert_array_equal(np.isnan(store.keys), expected)
        np.testing.assert_array_equal(np.isnan(reference.coded(k, BITS[dtype], group_size)), expected)
        clean = np.asarray(store_of(keys, values, dtype, group_size=group_size).keys)
        np.testing.assert_array_equal(np.asarray(store.keys)[~expected], clean[~expected])
        where = np.argwhere(np.isnan(store.values))
        assert (where[:, :2] == [0, 7]).all() and set(where[:, 2]) == set(range(32 if group_size == 32 else 0, 40))


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, -3.7, 3e38, -3e38, 1e-38, 1e-45, -1e-42])
def test_constant_rows_come_back_exactly(isa, dtype, number):
    x = np.full((2, 3, 40), number, np.float32)
    store = store_of(x, -x, dtype, group_size=32)
    np.testing.assert_array_equal(store.keys, x)
    np.testing.assert_array_equal(store.values, -x)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 2.0**-126, 2.0**-119, 1e-30, 1.0, 1e30, 1.7e38])
def test_rows_of_any_size(rng, isa, dtype, size):
    """From subnormal numbers to those whose range just fits a float32."""
    x = (size * rng.uniform(-1, 1, (2, 20, 40))).astype(np.float32)
    store = store_of(x, x, dtype)
    check(np.asarray(store.keys), x, BITS[dtype])
    check(np.asarray(store.values), x, BITS[dtype])


@pytest.mark.parametrize("dtype", BITS)
def test_a_range_beyond_float32(rng, isa, dtype):
    x = (3.4e38 * rng.uniform(-1, 1, (2, 20, 40))).astype(np.float32)
    x[..., 0], x[..., 1] = np.finfo(np.float32).max, np.finfo(np.float32).min
    check(np.asarray(store_of(x, x, dtype).keys), x, BITS[dtype])


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("ulps", [1, 2, 40, 1000])
def test_rows_far_from_zero(rng, isa, dtype, ulps):
    """A range of a few float32 steps: decoded numbers stay within rounding of where they were."""
    x = np.float32(1000) + (2.0**-14 * rng.integers(0, ulps + 1, (2, 20, 40))).astype(np.float32)
    check(np.asarray(store_of(x, x, dtype).keys), x, BITS[dtype])


@pytest.mark.parametrize("dtype", BITS)
def test_the_same_codes_on_every_instruction_set(rng, dtype):
    keys, values = rows(rng, 2, 50, 80, 33)
    before, stores = _core.isa(), []
    try:
        for isa in _core.available_isas():
            _core.set_isa(isa)
            stores.append(store_of(keys, values, dtype, group_size=32, channel_scales=True))
    finally:
        _core.set_isa(before)
    assert all(same(store, stores[0]) for store in stores)


@pytest.mark.parametrize(
    ("dtype", "dim", "group_size", "row"),
    [("int8", 128, None, 136), ("int8", 100, 32, 160), ("int8", 1, None, 40),
     ("int4", 128, None, 72), ("int4", 128, 32, 96), ("int4", 33, 32, 48), ("int4", 192, 128, 112)],
)  # fmt: skip
def test_memory_can_be_computed_beforehand(dtype, dim, group_size, row):
    capacity, count = 1 << 18, 20_000
    store = KVStore(2, dim, 64, dtype, capacity, group_size=group_size)
    assert (store.nbytes, store.keys.nbytes) == (0, 0)
    k, v = np.zeros((2, 1, dim), np.float32), np.zeros((2, 1, 64), np.float32)
    store.append(np.broadcast_to(k, (2, count, dim)), np.broadcast_to(v, (2, count, 64)))
    value_row = 64 * BITS[dtype] // 8 + 8 * (1 if group_size is None else -(-64 // group_size))
    assert (store.keys.nbytes, store.values.nbytes) == (2 * count * row, 2 * count * value_row)
    assert store.nbytes == sum(2 * -(-count * width // STEP) * STEP for width in (row, value_row))
    small = KVStore(2, dim, 64, dtype, 16, group_size=group_size)
    small.append(k, v)
    assert 0 < small.nbytes <= 4 << 16, "a page per head, keys and values each"


@pytest.mark.parametrize("dtype", BITS)
def test_a_full_store_stays_as_it_is(rng, dtype):
    keys, values = rows(rng, 2, 10, 40, 33)
    store = KVStore(2, 40, 33, dtype, 10)
    store.append(keys, values)
    before = decoded(store)
    with pytest.raises(ValueError, match=r"1 rows on top of 10, .* the capacity of 10"):
        store.append(keys[:, :1], values[:, :1])
    with pytest.raises(ValueError, match=r"^v: got shape"):
        store.append(keys[:, :0], keys[:, :0])
    for actual, expected in zip(decoded(store), before, strict=True):
        np.testing.assert_array_equal(actual, expected)
    store.truncate(9)
    store.append(keys[:, 9:], values[:, 9:])
    assert len(store) == 10


SCALES = np.ones((2, 40), np.float32)


def spoilt(number):
    scales = SCALES.copy()
    scales[1, 3] = number
    return scales


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"dtype": "int2"}, TypeError, 'dtype: got \'int2\', expected float32, float16, bfloat16, "int8" or "int4"'),
        ({"dtype": np.int8}, TypeError, "dtype: got .*int8"),
        ({"dtype": "uint8"}, TypeError, "dtype: got 'uint8'"),
        ({"dtype": "bfloat16", "group_size": 32}, ValueError, "group_size: got 32 with dtype bfloat16, expected None"),
        ({"dtype": np.float16, "channel_scales": True}, ValueError, "channel_scales: .* with dtype float16"),
        ({"dtype": "float32", "channel_scales": SCALES}, ValueError, "channel_scales: .* with dtype float32"),
        ({"group_size": 0}, ValueError, "group_size: got 0"),
        ({"group_size": -32}, ValueError, "group_size: got -32"),
        ({"group_size": 16}, ValueError, "group_size: got 16, expected a power of two of at least 32"),
        ({"group_size": 48}, ValueError, "group_size: got 48, expected a power of two"),
        ({"group_size": 1 << 70}, ValueError, "group_size: got 1180591620717411303424"),
        ({"group_size": 32.0}, TypeError, "group_size: got 32.0, expected an integer"),
        ({"channel_scales": None}, TypeError, "channel_scales: got NoneType"),
        ({"channel_scales": 2.0}, TypeError, "channel_scales: got float"),
        ({"channel_scales": SCALES.astype(int)}, TypeError, "channel_scales: got dtype int64, expected a floating"),
        ({"channel_scales": SCALES[0]}, ValueError, r"channel_scales: got shape \(40,\), expected \(2, 40\)"),
        ({"channel_scales": SCALES.T}, ValueError, r"channel_scales: got shape \(40, 2\), expected \(2, 40\)"),
        *(
            ({"channel_scales": spoilt(number)}, ValueError, "channel_scales: .* expected 2 x 40 positive numbers")
            for number in (0, -1, np.nan, np.inf, 1e-45, 3e38)
        ),
        ({"capacity": 1 << 62}, ValueError, "capacity: got 4611686018427387904 rows"),
        ({"capacity": 1 << 55}, MemoryError, "keys"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        KVStore(**{"kv_heads": 2, "head_dim": 40, "dtype": "int8", "capacity": 10} | options)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("argument", ["head_dim", "value_dim"])
def test_rows_beyond_any_address_space(dtype, argument):
    for dim in (1 << 61, 1 << 62, (1 << 63) - 1):
        with pytest.raises(ValueError, match="capacity: got 10 rows of 1 heads"):
            KVStore(**{"kv_heads": 1, "head_dim": 4, "value_dim": 4, argument: dim}, dtype=dtype, capacity=10)
