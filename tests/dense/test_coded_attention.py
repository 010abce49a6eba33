"""`attention` over the rows of a store of codes: exact for what the codes stand for, and near what was appended."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn import _core
from longattn.reference import dense as reference
from longattn.reference.kv import coded_rows
from random_arrays import BF16, DTYPES, F32, LAYOUTS, normal
from random_stores import rows as random_rows
from random_stores import store_of
from running import on_threads
from tolerances.exact import MULTIPLY_BYTES

BITS = {"int8": 8, "int4": 4}
KINDS = list(BITS)


def decoded(store):
    return np.asarray(store.keys, np.float64), np.asarray(store.values, np.float64)


def integers(store):
    """Whether a kernel may multiply integers: the instruction set does, and a key is its codes and one scale."""
    one_scale = -(-store.head_dim // 32) * 32 * BITS[store.dtype] // 8 + 8
    return _core.isa() in MULTIPLY_BYTES and store.keys.nbytes == store.kv_heads * len(store) * one_scale


def tolerance_of(q, store, scale=None, offset=0.0):
    scale = None if scale is None else float(np.abs(scale).max())
    return tolerances.coded_attention(
        q, *decoded(store), channels=store.channel_scales, integers=integers(store), scale=scale, offset=offset
    )


def check(q, store, *, offset=0.0, **options):
    """Compare output and lse with the reference over the decoded rows."""
    out, lse = la.attention(q, store.keys, store.values, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], store.value_dim)
    assert lse.dtype == np.float32 and lse.shape == q.shape[:-1]
    expected, expected_lse = reference.attention(q, *decoded(store), return_lse=True, **options)
    tolerance_of(q, store, options.get("scale"), offset).check(out, expected, lse, expected_lse)


def same(q, store, one, other):
    """Two results `(output, lse)` that say the same, each with its own rounding."""
    one_sided = tolerance_of(q, store)
    atol, rtol, lse_atol = (2 * x for x in (one_sided.atol, one_sided.rtol, one_sided.lse_atol))
    tolerance = tolerances.Tolerance(atol=atol, rtol=rtol, lse_atol=lse_atol)
    tolerance.check(one[0], np.asarray(other[0], np.float64), one[1], other[1])


def problem(rng, kind, *, heads=4, kv_heads=2, rows=1, keys=70, dim=64, value_dim=None, q_dtype=F32, **options):
    """Queries, and a store of keys and values with an offset, as models have them."""
    store = store_of(*random_rows(rng, kv_heads, keys, dim, value_dim), kind, **options)
    return normal(rng, (heads, rows, dim), q_dtype), store


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 5, 31, 32, 33, 64, 80, 128, 192, 576])
def test_head_dims(rng, isa, dim, kind):
    for rows, keys, causal in ((1, 70, False), (5, 70, True), (18, 33, True)):
        check(*problem(rng, kind, rows=rows, keys=keys, dim=dim), causal=causal)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [4096, 10_000, 20_000])
def test_very_wide_rows(rng, isa, kind, dim):
    """Products of one sign and near the largest there are: sums of integers have room for them."""
    keys = rng.uniform(0.9, 1, (1, 20, dim)).astype(np.float32)
    keys[..., 0] = 0
    store = store_of(keys, keys, kind)
    for sign in (1, -1):
        check(sign * rng.uniform(0.9, 1, (1, 1, dim)).astype(np.float32), store)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 1), (16, 24), (1, 16), (192, 128), (128, 192), (40, 130)])
def test_value_dim_differs(rng, isa, dim, value_dim, kind):
    for rows in (1, 19):
        check(*problem(rng, kind, rows=rows, keys=50, dim=dim, value_dim=value_dim, group_size=32), causal=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", range(1, 9))
def test_values_of_keys_with_one_channel(rng, isa, kind, group):
    """Logits have next to no error then, however queries are rounded: what remains is that of the sums over values."""
    for keys, value_dim in ((1, 1), (5, 40), (131, 7), (300, 130)):
        k, v = rng.standard_normal((2, keys, 1)), rng.standard_normal((2, keys, value_dim))
        v *= 10.0 ** rng.integers(-6, 1, (2, keys, 1))
        v[:, ::5] = v[:, ::5, :1]  # one number in all channels
        v[:, 3::7] = 0
        store = store_of(k.astype(np.float32), v.astype(np.float32), kind)
        for size in (0.01, 1, 6):
            check((size * normal(rng, (2 * group, 1, 1))).astype(np.float32), store)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
def test_decode_rows_and_groups(rng, isa, kind, group):
    for rows in range(1, 10):
        check(*problem(rng, kind, heads=2 * group, rows=rows, keys=45, dim=64), causal=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("channel_scales", [False, True])
def test_formats(rng, isa, kind, group_size, channel_scales):
    for rows, keys, dim in ((1, 300, 128), (6, 90, 100), (40, 90, 192)):
        check(*problem(rng, kind, rows=rows, keys=keys, dim=dim, group_size=group_size, channel_scales=channel_scales))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channel_scales", [False, True])
def test_prefill(rng, isa, kind, channel_scales):
    check(*problem(rng, kind, rows=200, keys=200, dim=80, group_size=32, channel_scales=channel_scales), causal=True)
    check(*problem(rng, kind, rows=200, keys=330, dim=64, channel_scales=channel_scales))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000])
def test_ragged_keys(rng, isa, keys, kind):
    for rows in (1, 2, 16, 65):
        check(*problem(rng, kind, heads=2, kv_heads=1, rows=rows, keys=keys, dim=40), causal=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_query_dtypes(rng, isa, q_dtype, kind, rows):
    check(*problem(rng, kind, rows=rows, keys=129, dim=72, q_dtype=q_dtype, channel_scales=True), causal=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_query_layouts_and_out(rng, isa, layout):
    _, store = problem(rng, "int8", keys=67)
    for rows in (1, 20):
        q = normal(rng, (4, rows, 64), layout=layout)
        check(q, store, causal=True)
        expected = la.attention(np.ascontiguousarray(q), store.keys, store.values)
        out = np.full(expected.shape, np.nan, np.float32)
        assert la.attention(q, store.keys, store.values, out=out) is out
        np.testing.assert_array_equal(out, expected)


def test_torch_queries(rng):
    torch = pytest.importorskip("torch")
    q, store = problem(rng, "int4", rows=3)
    for dtype in (torch.float32, torch.bfloat16):
        out = la.attention(torch.from_numpy(q).to(dtype), store.keys, store.values)
        assert out.dtype == dtype
        numbers = torch.from_numpy(q).to(dtype).float().numpy()
        expected = torch.from_numpy(la.attention(numbers, store.keys, store.values)).to(dtype)
        torch.testing.assert_close(out, expected)


def test_keys_of_one_store_and_values_of_another(rng, isa):
    for sizes in ((64, 32), (None, 32), (64, None)):
        q, store = problem(rng, "int8", rows=3, dim=100, group_size=sizes[0])
        _, other = problem(rng, "int8", dim=40, value_dim=70, group_size=sizes[1])
        out = la.attention(q, store.keys, other.values)
        keys, values = decoded(store)[0], decoded(other)[1]
        tolerance = tolerances.coded_attention(q, keys, values, integers=integers(store))
        tolerance.check(out, reference.attention(q, keys, values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "keys"), [(1, 100), (7, 100), (200, 300), (40, 9)])
def test_options(rng, isa, kind, rows, keys):
    q, store = problem(rng, kind, rows=rows, keys=keys, dim=40, channel_scales=True)
    seen = rng.random((rows, keys)) > 0.3
    seen[-1] = False
    check(q, store, causal=True)
    for window in ((0, 0), (3, -1), (-1, 2), (16, 16), (64, 0)):
        check(q, store, window=window)
        check(q, store, window=window, causal=True)
    check(q, store, mask=seen)
    check(q, store, mask=seen[:1], causal=True)
    check(q, store, bias=normal(rng, (4, 1, keys)), offset=5.0)
    check(q, store, softcap=0.7)
    check(q, store, softcap=30.0, causal=True)
    check(q, store, sinks=np.float32([-2, 0.5, 4, -np.inf]), offset=4.0)
    check(q, store, alibi_slopes=np.float32([1, 0.5, 0.25, 0.1]), offset=keys)
    check(q, store, scale=normal(rng, (4, rows)), causal=True)
    check(q, store, relative_bias=normal(rng, (4, 9)), offset=5.0)
    check(q, store, segments=(np.arange(rows) // 3, np.arange(keys) // 40))
    check(q, store, visible_until=rng.integers(0, keys, keys), causal=True)
    check(
        q, store, causal=True, window=(60, -1), scale=0.3, softcap=8.0, bias=normal(rng, (4, 1, keys)), mask=seen,
        alibi_slopes=rng.random(4), sinks=normal(rng, (4,)), offset=keys,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 20])
def test_peaked_softmax(rng, isa, kind, rows):
    """Logits far apart, so that the running maximum rises and most weights underflow."""
    q, store = problem(rng, kind, rows=rows, keys=300)
    check(q, store, scale=4.0)
    check((20 * q).astype(np.float32), store)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 20])
def test_large_channels(rng, isa, kind, rows):
    """A few channels of keys a hundred times as large as the rest, and queries small there."""
    keys, values = random_rows(rng, 2, 90, 64)
    q = normal(rng, (4, rows, 64))
    keys[..., [3, 40]] *= 100
    q[..., [3, 40]] /= 100
    for options in ({}, {"channel_scales": True}, {"group_size": 32, "channel_scales": True}):
        check(q, store_of(keys, values, kind, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 7, 20])
def test_parts_of_the_keys_merge(rng, isa, kind, rows):
    """The result over all keys, from two stores with half of them each, by `merge` and by a carried state."""
    keys, values = random_rows(rng, 2, 90, 40)
    whole, q = store_of(keys, values, kind), normal(rng, (4, rows, 40))
    halves = [store_of(keys[:, part], values[:, part], kind) for part in (slice(0, 41), slice(41, None))]
    first, second = (la.attention(q, half.keys, half.values, return_lse=True) for half in halves)
    expected = la.attention(q, whole.keys, whole.values, return_lse=True)
    same(q, whole, la.merge([first, second]), expected)
    carried = la.attention(q, halves[1].keys, halves[1].values, state=first, return_lse=True)
    same(q, whole, carried, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_step_is_last_row_of_prefill(rng, isa, kind):
    q, store = problem(rng, kind, heads=8, rows=150, keys=150, dim=40, channel_scales=True)
    prefill = la.attention(q, store.keys, store.values, causal=True, return_lse=True)
    whole = store.fork()
    for n in (150, 65, 17, 16, 2, 1):
        store.truncate(n)
        step = la.attention(q[:, n - 1 : n], store.keys, store.values, causal=True, return_lse=True)
        same(q, whole, step, [x[:, n - 1 : n] for x in prefill])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 20])
def test_numbers_that_are_decoded_beforehand(rng, isa, kind, rows):
    """The same as attention over what `numpy.asarray` makes of the rows."""
    q, store = problem(rng, kind, rows=rows, keys=500, dim=80, group_size=32)
    ours = la.attention(q, store.keys, store.values, return_lse=True)
    same(q, store, ours, la.attention(q, np.asarray(store.keys), np.asarray(store.values), return_lse=True))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_from_8_bits_of_decoded_rows(rng, isa, kind):
    """Rows of codes are rounded to bytes as the numbers that they stand for."""
    q, store = problem(rng, kind, rows=40, keys=500, dim=80, group_size=32)
    ours = la.attention(q, store.keys, store.values, qk_int8=True, return_lse=True)
    theirs = la.attention(q, np.asarray(store.keys), np.asarray(store.values), qk_int8=True, return_lse=True)
    same(q, store, ours, theirs)
    exact = la.attention(q, store.keys, store.values)
    assert isa not in ("avx512vnni", "avx512bf16", "amx") or (ours[0] != exact).any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_store(isa, kind):
    store = la.KVStore(2, 40, 33, kind, 10, channel_scales=True)
    for rows in (1, 20):
        out, lse = la.attention(np.ones((4, rows, 40), np.float32), store.keys, store.values, return_lse=True)
        assert out.shape == (4, rows, 33) and (out == 0).all() and (lse == -np.inf).all()
    assert la.attention(np.ones((4, 0, 40), np.float32), store.keys, store.values).shape == (4, 0, 33)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 20])
def test_rows_that_see_nothing(rng, isa, kind, rows):
    q, store = problem(rng, kind, rows=rows, keys=67)
    mask = np.ones((rows, 67), bool)
    mask[0] = False
    out, lse = la.attention(q, store.keys, store.values, mask=mask, return_lse=True)
    assert (out[:, 0] == 0).all() and (lse[:, 0] == -np.inf).all()
    assert np.isfinite(out).all() and np.isfinite(lse[:, 1:]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channel_scales", [False, True])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_masked_rows_do_not_leak(rng, isa, kind, channel_scales, poison):
    keys, values = random_rows(rng, 2, 300, 40)
    seen = np.ones(300, bool)
    seen[rng.choice(300, 40, replace=False)] = False
    seen[256:], seen[:20] = False, False
    scales = coded_rows.channel_scales(keys) if channel_scales else False
    clean = store_of(keys, values, kind, channel_scales=scales)
    keys[:, ~seen], values[:, ~seen] = poison, poison
    spoilt = store_of(keys, values, kind, channel_scales=scales)
    for rows in (1, 9, 20):
        q = normal(rng, (4, rows, 40))
        one, other = (la.attention(q, s.keys, s.values, mask=seen, return_lse=True) for s in (spoilt, clean))
        same(q, clean, one, other)
    # The same by causality and window: the last row alone sees the last key, none sees the first 20.
    values[:, 20:-1], keys[:, 20:-1] = 1, 1
    spoilt = store_of(keys, values, kind, channel_scales=scales)
    for rows in (1, 20):
        q = normal(rng, (4, rows, 40))
        out = la.attention(q, spoilt.keys, spoilt.values, causal=True, window=(200, 0))
        np.testing.assert_allclose(out[:, :-1], 1, rtol=tolerance_of(q, spoilt).rtol)
        assert np.isnan(out[:, -1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 9, 20])
def test_visible_nans_propagate(rng, isa, kind, rows):
    keys, values = random_rows(rng, 2, 300, 70)
    q = normal(rng, (2, rows, 70))
    for spoilt in "qkv":
        arrays = {"q": q.copy(), "k": keys.copy(), "v": values.copy()}
        arrays[spoilt][{"q": (1, 0, 5), "k": (1, 270, 69), "v": (1, 31, 40)}[spoilt]] = np.nan
        store = store_of(arrays["k"], arrays["v"], kind, group_size=32)
        out, lse = la.attention(arrays["q"], store.keys, store.values, return_lse=True)
        expected = np.zeros(out.shape, bool)
        if spoilt == "q":
            expected[1, 0] = True
        elif spoilt == "k":
            expected[1] = True
        else:
            expected[1, :, 32:64] = True  # the group of the value, and nothing else
        np.testing.assert_array_equal(np.isnan(out), expected, err_msg=spoilt)
        np.testing.assert_array_equal(np.isnan(lse), expected.all(axis=-1), err_msg=spoilt)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_of_zeros_and_of_any_size(rng, isa, kind):
    q, store = problem(rng, kind, rows=4, keys=90)
    q[:, 0] = 0
    q[:, 1] *= 1e-30
    q[:, 2] *= 1e-42
    check(q, store)
    q[:, 3] = 0
    q[:, 3, 7] = -1000.0
    check(q, store)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 20_011, 8), (5, 9_000, 4), (37, 5_000, 2)], ids=str)
def test_the_same_bits_on_any_number_of_threads(rng, isa, kind, shape):
    rows, keys, heads = shape
    q, store = problem(rng, kind, heads=heads, rows=rows, keys=keys, dim=64, group_size=32, channel_scales=True)
    results = on_threads(lambda: la.attention(q, store.keys, store.values, causal=True, return_lse=True), (1, 2, 3, 1))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out.view(np.uint32), results[0][0].view(np.uint32))
        np.testing.assert_array_equal(lse.view(np.uint32), results[0][1].view(np.uint32))


# What coding costs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"group_size": 32}, {"channel_scales": True}, {"group_size": 32, "channel_scales": True}], ids=str
)
@pytest.mark.parametrize("rows", [1, 20])
def test_error_against_what_was_appended(rng, isa, kind, options, rows):
    """Output and lse stay within what half a scale per number can do, and the codes do cost something."""
    keys, values = random_rows(rng, 2, 200, 64)
    q = normal(rng, (4, rows, 64), spread=0.5)
    store = store_of(keys, values, kind, **options)
    out, lse = la.attention(q, store.keys, store.values, return_lse=True)
    exact, exact_lse = reference.attention(q, keys, values, return_lse=True)
    bound, lse_bound = tolerances.code_error(
        q, keys, values, BITS[kind], options.get("group_size"), store.channel_scales
    )
    tolerance = tolerance_of(q, store)
    assert (np.abs(out - exact) <= bound + tolerance.atol + tolerance.rtol * np.abs(exact)).all()
    assert (np.abs(lse - exact_lse) <= lse_bound + tolerance.lse_atol + tolerance.lse_rtol * np.abs(exact_lse)).all()
    assert np.abs(out - exact).max() > (1e-3 if kind == "int4" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channel_scales", [False, True])
def test_logits_against_what_was_appended(rng, isa, kind, channel_scales):
    """With one key the lse is its logit, which is off by at most `sum |q| scale / 2`; some come near that."""
    keys, values = random_rows(rng, 1, 100, 33)
    scales = coded_rows.channel_scales(keys) if channel_scales else False
    steps, near = [], 0.0
    for j in range(100):
        k, v = keys[:, j : j + 1], values[:, j : j + 1]
        store = store_of(k, v, kind, room=1, channel_scales=scales)
        # A query along the errors of the codes is what they hurt most.
        for q in (normal(rng, (1, 1, 33)), np.sign(k - np.asarray(store.keys)).astype(np.float32)):
            out, lse = la.attention(q, store.keys, store.values, return_lse=True)
            _, bound = tolerances.code_error(q, k, v, BITS[kind], channels=store.channel_scales)
            off = abs(lse.item() - 33**-0.5 * (q.astype(np.float64) * k).sum())
            assert off <= bound.item() + tolerance_of(q, store).lse_atol
            near = max(near, off / bound.item())
            steps.append(np.abs(out - np.asarray(store.values)).max())
    assert near > 0.4
    assert max(steps) <= 1e-5 * np.abs(values).max()


@pytest.mark.parametrize("kind", KINDS)
def test_more_bits_smaller_groups_and_channel_scales_cost_less(rng, kind):
    """Keys with a few channels far larger than the rest, as models have them."""
    keys, values = random_rows(rng, 2, 400, 128)
    keys[..., [5, 77]] *= 25
    q = normal(rng, (4, 6, 128), spread=0.5)
    _, exact = reference.attention(q, keys, values, return_lse=True)

    def error(kind, **options):
        store = store_of(keys, values, kind, **options)
        _, lse = la.attention(q, store.keys, store.values, return_lse=True)
        return np.sqrt(((lse - exact) ** 2).mean())

    plain = error(kind)
    assert error(kind, group_size=32) < 0.9 * plain
    assert error(kind, channel_scales=True) < 0.5 * plain
    assert error("int8") < error("int4")


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_from_the_numbers_that_were_appended(rng, isa, kind):
    """Oracle and store each code the rows on their own. Numbers on a grid of codes leave nothing to rounding."""
    largest = 2 ** BITS[kind] - 1
    keys, values = (rng.integers(0, largest + 1, (2, 90, 64)) for _ in range(2))
    keys[..., 0], keys[..., 1], values[..., 0], values[..., 1] = 0, largest, 0, largest
    keys, values = ((x / 128).astype(np.float32) for x in (keys, values))
    store = store_of(keys, values, kind)
    np.testing.assert_array_equal(store.keys, keys)
    for rows in (1, 20):
        q = normal(rng, (4, rows, 64), BF16).astype(np.float32)
        out, lse = la.attention(q, store.keys, store.values, causal=True, return_lse=True)
        expected, expected_lse = coded_rows.attention(q, keys, values, bits=BITS[kind], causal=True, return_lse=True)
        tolerance_of(q, store).check(out, expected, lse, expected_lse)
