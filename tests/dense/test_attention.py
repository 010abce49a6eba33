"""`attention` against its float64 reference, and the identities between its options."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F16, F32, LAYOUTS, lay, normal, qkv


def check(q, k, v, *, offset=0.0, **options):
    """Compare output and lse with the reference."""
    out, lse = la.attention(q, k, v, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    assert lse.dtype == np.float32 and lse.shape == q.shape[:-1]
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    tolerance = tolerances.attention(q, k, v, scale=options.get("scale"), offset=offset)
    tolerance.check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("dim", [1, 3, 4, 16, 40, 64, 80, 96, 128, 200, 256, 576])
def test_head_dims(rng, isa, dim):
    check(*qkv(rng, rows=1, keys=70, dim=dim))
    check(*qkv(rng, rows=18, keys=33, dim=dim), causal=True)


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 1), (16, 24), (1, 16), (192, 128), (576, 512), (40, 130)])
@pytest.mark.parametrize("rows", [1, 19])
def test_value_dim_differs(rng, isa, dim, value_dim, rows):
    check(*qkv(rng, rows=rows, keys=50, dim=dim, value_dim=value_dim), causal=True)


@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000])
@pytest.mark.parametrize("rows", [1, 2, 16, 65])
def test_ragged_keys(rng, isa, rows, keys):
    check(*qkv(rng, heads=2, kv_heads=1, rows=rows, keys=keys, dim=24), causal=True)
    check(*qkv(rng, heads=2, kv_heads=1, rows=rows, keys=keys, dim=24))


@pytest.mark.parametrize("rows", [3, 15, 17, 63, 64, 255, 256, 257, 1000])
@pytest.mark.parametrize("keys", [17, 257])
def test_ragged_queries(rng, isa, rows, keys):
    check(*qkv(rng, heads=1, kv_heads=1, rows=rows, keys=keys, dim=8), causal=True)


@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "keys", "dim"), [(1, 300, 64), (5, 41, 20), (40, 129, 72)])
def test_dtypes(rng, isa, *, q_dtype, kv_dtype, rows, keys, dim):
    check(*qkv(rng, rows=rows, keys=keys, dim=dim, q_dtype=q_dtype, kv_dtype=kv_dtype), causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_storage_values(rng, isa, dtype):
    """Subnormals and the largest numbers of the storage dtypes are read exactly."""
    q, k, v = qkv(rng, rows=2, keys=40, dim=32, q_dtype=dtype)
    info = np.finfo(np.float16) if dtype == F16 else np.finfo(np.float32)
    v[..., :4] = np.asarray(0.75 * float(info.max) if dtype == F16 else 1e30, dtype)
    v[..., 4:8] = np.asarray(float(info.smallest_subnormal) * 3 if dtype == F16 else 1e-30, dtype)
    k[..., :2] = np.asarray(2.0**-24 if dtype == F16 else 1e-38, dtype)
    check(q, k, v)
    out = np.asarray(la.attention(q, k, v)[..., 4:8], np.float64)
    np.testing.assert_allclose(out, np.float64(v[0, 0, 0, 4]), rtol=0.34 if dtype == F16 else 0.01)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 3), (8, 8), (7, 1), (16, 1), (40, 2)])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_groups(rng, isa, heads, kv_heads, rows):
    q, k, v = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=45, dim=32)
    check(q, k, v, causal=True)
    repeated = [np.repeat(x, heads // kv_heads, axis=1) for x in (k, v)]
    out, lse = la.attention(q, k, v, return_lse=True)
    expected, expected_lse = la.attention(q, *repeated, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_layouts(rng, isa, layout, dtype, rows):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=rows, keys=67, dim=20, q_dtype=dtype, layout=layout)
    check(q, k, v, causal=True)
    contiguous = [np.ascontiguousarray(x) for x in (q, k, v)]
    np.testing.assert_array_equal(la.attention(q, k, v), la.attention(*contiguous))


@pytest.mark.parametrize("layout", ["contiguous", "blhd", "sliced", "fused", "reversed"])
def test_out(rng, isa, layout):
    q, k, v = qkv(rng, batch=2, rows=20, keys=67, dim=20, value_dim=12)
    out = lay(np.full((2, 4, 20, 12), np.nan, np.float32), layout)
    returned, lse = la.attention(q, k, v, out=out, return_lse=True)
    assert returned is out
    expected, expected_lse = la.attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


def test_out_is_written_only_inside_its_view(rng, isa):
    q, k, v = qkv(rng, rows=20, keys=67, dim=20, value_dim=13)
    buffer = np.full((1, 4, 22, 15), 7.0, np.float32)
    la.attention(q, k, v, out=buffer[:, :, 1:21, 1:14])
    buffer[:, :, 1:21, 1:14] = 7.0
    assert (buffer == 7.0).all()


def test_inputs_are_not_written(rng, isa):
    arrays = qkv(rng, rows=20, keys=67)
    before = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    la.attention(*arrays, causal=True)
    for x, y in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_rank_3(rng, isa):
    q, k, v = qkv(rng, rows=6, keys=40)
    bias = normal(rng, (4, 1, 40))
    out, lse = la.attention(q[0], k[0], v[0], bias=bias, alibi_slopes=np.ones(4, np.float32), return_lse=True)
    whole = la.attention(q, k, v, bias=bias, alibi_slopes=np.ones((1, 4), np.float32), return_lse=True)
    np.testing.assert_array_equal(out, whole[0][0])
    np.testing.assert_array_equal(lse, whole[1][0])


WINDOWS = [(0, 0), (3, -1), (-1, 2), (5, 0), (16, 16), (64, 0), (200, 3), (10**18, 10**18)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("rows", "keys"), [(1, 100), (7, 100), (70, 70), (130, 300), (40, 9)])
def test_window(rng, isa, window, rows, keys):
    q, k, v = qkv(rng, rows=rows, keys=keys, dim=8)
    position = np.arange(rows)[:, None] + keys - rows - np.arange(keys)
    for causal in (False, True):
        check(q, k, v, window=window, causal=causal)
        left, right = window
        mask = (position <= left if left >= 0 else True) & (position >= -right if right >= 0 else True)
        mask = np.broadcast_to(mask & ((position >= 0) | (not causal)), position.shape)
        out, lse = la.attention(q, k, v, mask=mask, return_lse=True)
        windowed = la.attention(q, k, v, window=window, causal=causal, return_lse=True)
        tolerances.same_storage(q, k, v).check(windowed[0], out, windowed[1], lse)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, -0.5, 3.0])
@pytest.mark.parametrize("rows", [1, 20])
def test_scale(rng, isa, scale, rows):
    check(*qkv(rng, rows=rows, keys=90), scale=scale)


@pytest.mark.parametrize("rows", [1, 20])
def test_peaked_softmax(rng, isa, rows):
    """Logits far apart, so that the running maximum rises and most weights underflow."""
    q, k, v = qkv(rng, rows=rows, keys=300, dim=32, spread=30.0)
    check(q, k, v)
    rising = np.sort((k * q[:, ::2, :1]).sum(axis=-1), axis=-1)  # each key beats all before it
    k = q[:, ::2, :1] * rising[..., None] / (q[:, ::2, :1] ** 2).sum(axis=-1, keepdims=True)
    check(q, k.astype(np.float32), v)


@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_large_common_logit(rng, isa, offset):
    """A constant added to every logit changes only the lse, and nothing overflows."""
    q, k, v = qkv(rng, rows=3, keys=90)
    check(q, k, v, bias=np.full((1, 1, 1, 1), offset, np.float32), offset=abs(offset))


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("rows", [1, 20])
def test_softcap(rng, isa, softcap, rows):
    check(*qkv(rng, rows=rows, keys=90, spread=10.0), softcap=softcap, causal=True)


def test_softcap_limits(rng, isa):
    """A tiny cap makes all visible keys equal, a huge one does nothing."""
    q, k, v = qkv(rng, rows=4, keys=90)
    mean = np.repeat(v.mean(axis=2, keepdims=True), 2, axis=1)
    tolerance = tolerances.same_storage(q, k, v)
    out, lse = la.attention(q, k, v, softcap=1e-30, return_lse=True)
    tolerance.check(out, np.broadcast_to(mean, out.shape), lse, np.full(lse.shape, np.log(90)))
    out, lse = la.attention(q, k, v, softcap=1e6, return_lse=True)
    expected, expected_lse = la.attention(q, k, v, return_lse=True)
    tolerance.check(out, expected, lse, expected_lse)


BROADCASTS = [
    (2, 4, 20, 67),
    (1, 1, 20, 67),
    (20, 67),
    (67,),
    (2, 1, 1, 67),
    (4, 1, 1),
    (4, 20, 1),
    (1, 1, 1, 1),
    (),
]


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_bias_and_mask(rng, isa, shape, causal):
    q, k, v = qkv(rng, batch=2, rows=20, keys=67)
    bias = np.asarray(normal(rng, shape))
    offset = float(np.abs(bias).max())
    check(q, k, v, causal=causal, bias=bias, offset=offset)
    check(q, k, v, causal=causal, mask=np.asarray(bias > -0.3))
    check(q, k, v, causal=causal, bias=bias, mask=np.asarray(bias > -0.3), offset=offset)


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float64], ids=str)
def test_bias_dtypes(rng, isa, dtype):
    q, k, v = qkv(rng, rows=6, keys=40)
    bias = normal(rng, (6, 40), dtype)
    check(q, k, v, bias=bias.T.copy().T, offset=5.0)


def test_bias_of_minus_infinity_masks(rng, isa):
    q, k, v = qkv(rng, rows=20, keys=67)
    mask = rng.random((20, 67)) > 0.5
    mask[3] = False
    for low in (-np.inf, np.finfo(np.float64).min):
        out, lse = la.attention(q, k, v, bias=np.where(mask, 0.0, low), return_lse=True)
        expected, expected_lse = la.attention(q, k, v, mask=mask, return_lse=True)
        tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("causal", [False, True])
def test_alibi(rng, isa, rows, causal):
    q, k, v = qkv(rng, batch=2, heads=4, rows=rows, keys=67)
    distance = np.abs(np.arange(rows)[:, None] + 67 - rows - np.arange(67))
    for slopes in (2.0 ** -np.arange(1, 5), rng.random((2, 4), np.float32)):
        check(q, k, v, alibi_slopes=slopes, causal=causal, offset=67.0)
        bias = -slopes[..., None, None] * distance
        out, lse = la.attention(q, k, v, bias=bias, causal=causal, return_lse=True)
        alibi = la.attention(q, k, v, alibi_slopes=slopes, causal=causal, return_lse=True)
        tolerances.same_storage(q, k, v, offset=67.0).check(alibi[0], out, alibi[1], lse)


@pytest.mark.parametrize("rows", [1, 20])
def test_sinks_are_a_key_without_value(rng, isa, rows):
    q, k, v = qkv(rng, heads=3, kv_heads=3, rows=rows, keys=40)
    sinks = np.array([-2.0, 0.5, 4.0], np.float32)
    check(q, k, v, sinks=sinks, causal=True, offset=4.0)
    # One more key, of logit `sinks` and value 0, in front of the others.
    longer = [np.concatenate([np.zeros_like(x[:, :, :1]), x], axis=2) for x in (k, v)]
    bias = np.zeros((3, 1, 41), np.float32)
    bias[:, 0, 0] = sinks
    out, lse = la.attention(q, k, v, sinks=sinks, return_lse=True)
    expected, expected_lse = la.attention(q, *longer, bias=bias, return_lse=True)
    tolerances.same_storage(q, k, v, offset=4.0).check(out, expected, lse, expected_lse)


def test_sinks_far_off_the_logits(rng, isa):
    q, k, v = qkv(rng, heads=3, kv_heads=1, rows=2, keys=40)
    check(q, k, v, sinks=np.array([-np.inf, 200.0, -200.0], np.float32), offset=200.0)


def test_sinks_without_visible_keys(rng, isa):
    """The sink takes the whole softmax: the output is 0 and the lse is the sink itself."""
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=6, keys=4)
    sinks = np.array([1.5, -3.0], np.float32)
    out, lse = la.attention(q, k, v, sinks=sinks, causal=True, return_lse=True)
    assert (out[:, :, :2] == 0).all()
    np.testing.assert_array_equal(lse[0, :, :2], np.repeat(sinks[:, None], 2, axis=1))
    check(q, k, v, sinks=sinks, causal=True, offset=3.0)


def test_all_options_together(rng, isa):
    for rows, keys in ((1, 200), (33, 200), (200, 150)):
        q, k, v = qkv(rng, batch=2, heads=6, kv_heads=2, rows=rows, keys=keys, dim=40, value_dim=24, q_dtype=BF16)
        check(
            q, k, v, causal=True, window=(90, -1), scale=0.3, softcap=8.0, bias=normal(rng, (6, 1, keys)),
            mask=rng.random((2, 1, rows, keys)) > 0.2, alibi_slopes=rng.random((2, 6)),
            sinks=normal(rng, (6,)), offset=200.0,
        )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 20])
def test_rows_that_see_nothing(rng, isa, rows):
    q, k, v = qkv(rng, rows=rows, keys=67)
    mask = np.ones((rows, 67), bool)
    mask[0] = False
    for dark in ({"mask": mask}, {"bias": np.where(mask, 0.0, -np.inf)}):
        out, lse = la.attention(q, k, v, return_lse=True, **dark)
        assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -np.inf).all()
        assert np.isfinite(out).all() and np.isfinite(lse[:, :, 1:]).all()


def test_more_causal_queries_than_keys(rng, isa):
    """Rows before the first key see nothing."""
    q, k, v = qkv(rng, rows=100, keys=30)
    out, lse = la.attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :70] == 0).all() and (lse[:, :, :70] == -np.inf).all()
    check(q, k, v, causal=True)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_masked_keys_do_not_leak(rng, isa, rows, dtype, poison):
    q, k, v = qkv(rng, rows=rows, keys=300, dim=24, q_dtype=dtype)
    seen = np.ones(300, bool)
    seen[rng.choice(300, 40, replace=False)] = False
    seen[256:] = False
    seen[:20] = False
    clean, clean_lse = la.attention(q, k, v, mask=seen, return_lse=True)
    k[:, :, ~seen], v[:, :, ~seen] = np.asarray(poison, dtype), np.asarray(poison, dtype)
    out, lse = la.attention(q, k, v, mask=seen, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, np.asarray(clean, np.float64), lse, clean_lse)
    # The same by causality and window: the last row alone sees the last key, none sees the first 20.
    k[:, :, seen], v[:, :, seen] = np.asarray(1, dtype), np.asarray(1, dtype)
    k[:, :, 20:], v[:, :, 20:] = np.asarray(1, dtype), np.asarray(1, dtype)
    k[:, :, -1], v[:, :, -1] = np.asarray(poison, dtype), np.asarray(poison, dtype)
    out = la.attention(q, k, v, causal=True, window=(200, 0))
    before = np.asarray(out[:, :, :-1], np.float64)
    tolerances.attention(q, np.ones_like(k), np.ones_like(v)).check(before, np.ones_like(before))
    assert not np.isfinite(out[:, :, -1]).any()


@pytest.mark.parametrize("group", [5, 8])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_masked_keys_do_not_leak_into_others_of_their_block(rng, isa, group, poison):
    """Rows that go through whole blocks of keys together."""
    q, k, v = qkv(rng, heads=2 * group, kv_heads=2, rows=1, keys=300, dim=64, q_dtype=BF16)
    seen = rng.random(300) < 0.7
    clean = la.attention(q, k, v, mask=seen, return_lse=True)
    k[:, :, ~seen] = np.asarray(poison, BF16)
    out, lse = la.attention(q, k, v, mask=seen, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, np.asarray(clean[0], np.float64), lse, clean[1])


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_visible_nans_propagate(rng, isa, rows, dtype):
    q, k, v = qkv(rng, heads=2, kv_heads=2, rows=rows, keys=300, dim=24, q_dtype=dtype)
    for spoilt, at in (("q", (0, 1, 0, 5)), ("k", (0, 1, 270, 23)), ("v", (0, 1, 31, 7))):
        arrays = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
        arrays[spoilt][at] = np.nan
        out, lse = la.attention(**arrays, return_lse=True)
        bad = np.isnan(np.asarray(out, np.float64))
        expected = np.zeros_like(bad)
        if spoilt == "q":
            expected[0, 1, 0] = True
        elif spoilt == "k":
            expected[0, 1] = True
        else:
            expected[0, 1, :, 7] = True
        np.testing.assert_array_equal(bad, expected, err_msg=spoilt)
        np.testing.assert_array_equal(np.isnan(lse), expected.all(axis=-1), err_msg=spoilt)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("option", ["softcap", "window", "bias", "mask", "alibi_slopes", "sinks"])
def test_visible_nans_propagate_through_options(rng, isa, rows, option):
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=rows, keys=300, dim=24)
    k[0, 0, 270, 23] = np.nan
    ones = np.ones(2, np.float32)
    values = {"softcap": 5.0, "window": (299, 299), "bias": np.zeros((rows, 300), np.float32),
              "mask": np.ones((rows, 300), bool), "alibi_slopes": ones, "sinks": ones}  # fmt: skip
    out, lse = la.attention(q, k, v, return_lse=True, **{option: values[option]})
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def test_visible_infinite_values_propagate(rng, isa):
    q, k, v = qkv(rng, heads=2, kv_heads=2, rows=3, keys=100, dim=24)
    v[0, 0, 50, 3], v[0, 0, 60, 4] = np.inf, -np.inf
    v[0, 1, 50, 5], v[0, 1, 60, 5] = np.inf, -np.inf
    check(q, k, v)


def test_mask_and_visible_nan(rng, isa):
    """With every other key masked, NaNs are still seen where they are visible, by the rows that see them."""
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=20, keys=100, dim=24)
    v[0, 0, 50] = np.nan
    k[0, 0, 51] = np.nan
    mask = rng.random((20, 100)) > 0.5
    check(q, k, v, mask=mask)
    mask[:, 50:52] = False
    check(q, k, v, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_step_is_last_row_of_prefill(rng, isa, dtype):
    q, k, v = qkv(rng, heads=8, rows=150, keys=150, dim=40, q_dtype=dtype)
    prefill, prefill_lse = la.attention(q, k, v, causal=True, return_lse=True)
    tolerance = tolerances.same_storage(q, k, v)
    for n in (1, 2, 16, 17, 65, 150):
        step, lse = la.attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], causal=True, return_lse=True)
        expected, expected_lse = prefill[:, :, n - 1 : n], prefill_lse[:, :, n - 1 : n]
        tolerance.check(step, np.asarray(expected, np.float64), lse, expected_lse)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_is_prefill(rng, isa, chunk):
    q, k, v = qkv(rng, rows=130, keys=130, dim=24)
    whole = la.attention(q, k, v, causal=True, window=(50, 0))
    parts = [
        la.attention(q[:, :, n : n + chunk], k[:, :, : n + chunk], v[:, :, : n + chunk], causal=True, window=(50, 0))
        for n in range(0, 130, chunk)
    ]
    tolerances.same_storage(q, k, v).check(np.concatenate(parts, axis=2), whole)


def test_batch_rows_are_independent(rng, isa):
    q, k, v = qkv(rng, batch=3, rows=20, keys=67)
    whole = la.attention(q, k, v, causal=True)
    for n in range(3):
        np.testing.assert_array_equal(whole[n], la.attention(q[n], k[n], v[n], causal=True))


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0), (0, 0, 0), (2, 1, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_do(isa, batch, rows, keys, dtype):
    q, k = np.ones((batch, 4, rows, 8), dtype), np.ones((batch, 2, keys, 8), dtype)
    v = np.ones((batch, 2, keys, 6), dtype)
    options = {"bias": np.zeros((1, 1, 1, keys), np.float32), "alibi_slopes": np.ones(4, np.float32)}
    for given in ({}, {"causal": True}, options):
        out, lse = la.attention(q, k, v, return_lse=True, **given)
        assert out.shape == (batch, 4, rows, 6) and out.dtype == dtype and (out == 0).all()
        assert lse.shape == (batch, 4, rows) and (lse == -np.inf).all()
