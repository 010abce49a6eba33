"""What `attention` does to scores beyond its plain options: scales, biases, segments, skipping, carried states."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F16, F32, normal, qkv
from running import on_threads

# Few rows take one kernel, many another; more keys than one piece are split and merged.
SHAPES = [(1, 67), (3, 2500), (20, 67), (33, 600), (9, 5)]


def check(q, k, v, *, offset=0.0, **options):
    out, lse = la.attention(q, k, v, return_lse=True, **options)
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    tolerance_of(q, k, v, options, offset).check(out, expected, lse, expected_lse)


def tolerance_of(q, k, v, options, offset=0.0):
    scale = options.get("scale")
    scale = None if scale is None else float(np.abs(scale).max())
    return tolerances.attention(q, k, v, scale=scale, offset=offset)


def same(q, k, v, one, other, *, offset=0.0, **options):
    """Two sets of options (or results) that say the same."""
    first, second = (
        part if isinstance(part, tuple) else la.attention(q, k, v, return_lse=True, **part, **options)
        for part in (one, other)
    )
    tolerance = tolerances.same_storage(q, k, v, offset=offset)
    tolerance.check(first[0], np.asarray(second[0], np.float64), first[1], second[1])


def equal(q, k, v, one, other, **options):
    """Two sets of options that are the same arithmetic."""
    first, second = (la.attention(q, k, v, return_lse=True, **part, **options) for part in (one, other))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def runs(rng, length, count):
    """Numbers of `count` runs, some perhaps empty, one after another."""
    return np.sort(rng.integers(0, count, length)).astype(np.int32)


# scale


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales(rng, isa, rows, keys, dtype):
    q, k, v = qkv(rng, batch=2, rows=rows, keys=keys, q_dtype=dtype)
    for shape in ((4,), (4, rows), (2, 4, rows)):
        check(q, k, v, scale=normal(rng, shape), causal=True, softcap=9.0)


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_scales_are_one_scale(rng, isa, rows, keys, dtype):
    q, k, v = qkv(rng, batch=2, rows=rows, keys=keys, q_dtype=dtype)
    for scales in (np.full(4, 0.3, np.float32), np.full((2, 4, rows), 0.3, np.float32)):
        equal(q, k, v, {"scale": scales}, {"scale": 0.3}, causal=True)


@pytest.mark.parametrize("dtype", [F16, np.float64, BF16], ids=str)
def test_dtypes_and_strides_of_scales(rng, isa, dtype):
    q, k, v = qkv(rng, batch=2, rows=20, keys=50)
    scales = normal(rng, (20, 2, 4)).astype(dtype).transpose(1, 2, 0)
    equal(q, k, v, {"scale": scales}, {"scale": np.ascontiguousarray(scales, np.float32)})


def test_scale_per_query_is_a_scaled_query(rng, isa):
    q, k, v = qkv(rng, rows=20, keys=90)
    scales = (2.0 ** rng.integers(-3, 3, (4, 20))).astype(np.float32)  # exact products
    same(q, k, v, {"scale": scales}, la.attention(q * scales[..., None], k, v, scale=1.0, return_lse=True))


# biases


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("entries", [1, 2, 7, 64, 4000])
def test_relative_bias(rng, isa, rows, keys, entries):
    q, k, v = qkv(rng, batch=2, rows=rows, keys=keys)
    table = normal(rng, (4, entries))
    check(q, k, v, relative_bias=table, causal=True, offset=5.0)
    for zero in {0, entries // 2, entries - 1}:
        check(q, k, v, relative_bias=table, relative_zero=zero, offset=5.0)


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
def test_relative_bias_is_alibi(rng, isa, rows, keys):
    q, k, v = qkv(rng, rows=rows, keys=keys)
    slopes = 2.0 ** -np.arange(1, 5)
    span = rows + keys
    back = {"relative_bias": -slopes[:, None] * np.arange(span, -1, -1)}
    same(q, k, v, back, {"alibi_slopes": slopes}, causal=True, offset=span)
    both = {"relative_bias": -slopes[:, None] * np.abs(np.arange(-span, span + 1)), "relative_zero": span}
    same(q, k, v, both, {"alibi_slopes": slopes}, offset=span)


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
def test_relative_bias_is_a_window(rng, isa, rows, keys):
    """A table that ends in -inf beyond six keys back and two ahead; values behind it do not leak."""
    q, k, v = qkv(rng, rows=rows, keys=keys)
    table = np.zeros((4, 10), np.float32)
    table[:, [0, 9]] = -np.inf
    same(q, k, v, {"relative_bias": table, "relative_zero": 7}, {"window": (6, 1)})
    seen = np.arange(keys) >= keys - rows - 6
    v[:, :, ~seen] = np.nan
    same(q, k, v, {"relative_bias": table, "relative_zero": 7}, {"window": (6, 1)})


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_per_key_bias_is_a_full_bias(rng, isa, rows, keys, causal):
    q, k, v = qkv(rng, batch=2, rows=rows, keys=keys)
    bias = normal(rng, (2, 1, 1, keys), spread=3.0)
    check(q, k, v, bias=bias, causal=causal, offset=15.0)
    full = np.broadcast_to(bias, (2, 4, rows, keys))
    equal(q, k, v, {"bias": bias}, {"bias": full.copy()}, causal=causal)
    scattered = full.transpose(3, 0, 1, 2).copy().transpose(1, 2, 3, 0)  # keys far apart in memory
    equal(q, k, v, {"bias": bias}, {"bias": scattered}, causal=causal)


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
def test_layouts_of_masks_and_row_biases(rng, isa, rows, keys):
    q, k, v = qkv(rng, batch=2, rows=rows, keys=keys)
    mask = rng.random((1, 1, rows, keys)) > 0.4
    check(q, k, v, mask=mask)
    equal(q, k, v, {"mask": mask}, {"mask": mask.swapaxes(2, 3).copy().swapaxes(2, 3)})
    equal(q, k, v, {"mask": mask}, {"mask": mask[..., ::-1].copy()[..., ::-1]})
    bias = normal(rng, (4, rows, 1))
    equal(q, k, v, {"bias": bias}, {"bias": np.repeat(bias, keys, axis=2)})


# visibility


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_segments(rng, isa, rows, keys, causal):
    q, k, v = qkv(rng, batch=2, rows=rows, keys=keys)
    own, of_keys = rng.integers(-2, 3, (2, rows)), rng.integers(-2, 3, (2, keys))
    check(q, k, v, segments=(own, of_keys), causal=causal)
    check(q, k, v, segments=(own[0], of_keys), causal=causal)
    mask = own[:, None, :, None] == of_keys[:, None, None, :]
    equal(q, k, v, {"segments": (own, of_keys)}, {"mask": mask}, causal=causal)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_segments_are_a_block_diagonal_mask_and_packed_sequences(rng, isa, dtype):
    q, k, v = (x[0] for x in qkv(rng, rows=130, keys=130, dim=24, q_dtype=dtype))
    numbers = runs(rng, 130, 6)
    segmented = {"segments": (numbers, numbers), "causal": True}
    same(q, k, v, segmented, {"mask": numbers[:, None] == numbers, "causal": True})
    ends = np.searchsorted(numbers, np.arange(7))
    out, lse = la.attention_varlen(*(x.swapaxes(0, 1) for x in (q, k, v)), ends, ends, causal=True, return_lse=True)
    same(q, k, v, segmented, (out.swapaxes(0, 1), lse))


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_visible_until(rng, isa, rows, keys, causal):
    q, k, v = qkv(rng, batch=2, rows=rows, keys=keys)
    until = rng.integers(keys - rows - 3, keys + 3, (2, keys))
    check(q, k, v, visible_until=until, causal=causal)
    check(q, k, v, visible_until=until[0], causal=causal)
    position = np.arange(rows) + keys - rows
    mask = position[:, None] < until[:, None, None, :]
    equal(q, k, v, {"visible_until": until}, {"mask": mask}, causal=causal)


def test_visible_until_is_a_window(rng, isa):
    q, k, v = qkv(rng, rows=70, keys=90)
    same(q, k, v, {"visible_until": np.arange(90) + 10}, {"window": (9, -1)}, causal=True)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64], ids=str)
def test_integers_of_any_width(rng, isa, dtype):
    q, k, v = qkv(rng, rows=20, keys=60)
    own, of_keys = rng.integers(0, 3, 20), rng.integers(0, 3, 60)
    equal(q, k, v, {"segments": (own.astype(dtype), of_keys.astype(dtype))}, {"segments": (own, of_keys)})
    until = rng.integers(30, 70, 60)
    equal(q, k, v, {"visible_until": until.astype(dtype)}, {"visible_until": until})
    # Ends of the type's range are as good as "never" and "always".
    info = np.iinfo(dtype)
    extreme = np.where(until > 50, info.max, info.min).astype(dtype)
    equal(q, k, v, {"visible_until": extreme}, {"mask": until > 50})


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("option", ["segments", "visible_until"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_hidden_keys_do_not_leak(rng, isa, rows, option, poison):
    q, k, v = qkv(rng, rows=rows, keys=300)
    seen = rng.random(300) > 0.4
    options = {
        "segments": {"segments": (np.ones(rows, int), seen.astype(int))},
        "visible_until": {"visible_until": np.where(seen, 10**12, -(10**12))},
    }[option]
    clean = la.attention(q, k, v, return_lse=True, **options)
    k[:, :, ~seen] = v[:, :, ~seen] = poison
    same(q, k, v, la.attention(q, k, v, return_lse=True, **options), clean)
    state = la.attention(q, k[:, :, seen], v[:, :, seen], return_lse=True)
    same(q, k, v, la.attention(q, k, v, return_lse=True, state=state, **options), la.merge([state, clean]))


@pytest.mark.parametrize("rows", [1, 20])
def test_visible_nans_propagate(rng, isa, rows):
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=rows, keys=300)
    spoilt_k, spoilt_v = k.copy(), v.copy()
    spoilt_k[0, 0, 270, 3] = spoilt_v[0, 0, 270, :] = np.nan
    for options in (
        {"scale": np.ones(2, np.float32)},
        {"relative_bias": np.zeros((2, 9), np.float32)},
        {"segments": (np.ones(rows, int), np.ones(300, int))},
        {"visible_until": np.full(300, 300)},
        {"skip_threshold": 0.5},
        {"state": (np.zeros((1, 2, rows, 16), np.float32), np.zeros((1, 2, rows), np.float32))},
    ):
        assert np.isnan(la.attention(q, k, spoilt_v, **options)).all()
        out, lse = la.attention(q, spoilt_k, v, return_lse=True, **options)
        assert np.isnan(out).all() and np.isnan(lse).all()


@pytest.mark.parametrize("rows", [1, 20])
def test_rows_that_see_nothing(rng, isa, rows):
    q, k, v = qkv(rng, rows=rows, keys=67)
    lonely = np.zeros(rows, int)
    lonely[0] = 7
    until = np.full(67, 67 - rows + 1)  # the first row sees all, the others nothing
    for options, dark in (({"segments": (lonely, np.zeros(67, int))}, [0]), ({"visible_until": until}, range(1, rows))):
        out, lse = la.attention(q, k, v, return_lse=True, **options)
        expected = np.zeros(rows, bool)
        expected[list(dark)] = True
        np.testing.assert_array_equal((lse == -np.inf).all(axis=(0, 1)), expected)
        assert (out[:, :, expected] == 0).all() and np.isfinite(lse[:, :, ~expected]).all()


# skipping


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_threshold_0_skips_nothing(rng, isa, rows, keys, dtype):
    q, k, v = qkv(rng, rows=rows, keys=keys, q_dtype=dtype, spread=20.0)
    equal(q, k, v, {"skip_threshold": 0.0}, {}, causal=True)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_skipped_keys_are_as_if_they_were_not_there(rng, isa, rows, dtype):
    """Every key from 256 on weighs less than a fiftieth of the largest weight among the first."""
    q, k, v = qkv(rng, rows=rows, keys=900, q_dtype=dtype)
    q *= 0.01
    bias = np.zeros(900, np.float32)
    bias[256:] = -4.0
    few = (k[:, :, :256], v[:, :, :256])
    equal(q, k, v, {"bias": bias, "skip_threshold": 0.05}, {"bias": bias, "mask": np.arange(900) < 256})
    same(q, k, v, {"bias": bias, "skip_threshold": 0.05}, la.attention(q, *few, return_lse=True))
    equal(q, k, v, {"bias": bias, "skip_threshold": 0.005}, {"bias": bias})
    # A sliding window that has left the heavy keys behind meets no larger weight before: nothing is skipped.
    equal(q, k, v, {"bias": bias, "skip_threshold": 0.05}, {"bias": bias}, window=(200, 0))


@pytest.mark.parametrize("rows", [1, 20])
def test_one_row_that_needs_a_block_keeps_it(rng, isa, rows):
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=rows, keys=900)
    q *= 0.01
    bias = np.zeros((2, 1, 900), np.float32)
    bias[0, :, 256:] = -4.0  # the second head of the group needs all keys
    equal(q, k, v, {"bias": bias, "skip_threshold": 0.05}, {"bias": bias})


@pytest.mark.parametrize("rows", [1, 20])
def test_blocks_with_nan_are_not_skipped(rng, isa, rows):
    q, k, v = qkv(rng, rows=rows, keys=900)
    bias = np.zeros(900, np.float32)
    bias[256:] = -50.0
    k[:, :, 700, 0] = np.nan
    assert np.isnan(la.attention(q, k, v, bias=bias, skip_threshold=0.5)).all()


@pytest.mark.parametrize(("rows", "keys"), [(1, 900), (2, 5000), (33, 1500)])
@pytest.mark.parametrize("threshold", [1e-4, 1e-3, 1e-2, 0.3])
def test_error_of_skipping_is_bounded(rng, isa, rows, keys, threshold):
    q, k, v = qkv(rng, rows=rows, keys=keys, spread=4.0)
    options = {"alibi_slopes": np.array([0.01, 0.02, 0.03, 0.0]), "causal": True}
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    out, lse = la.attention(q, k, v, return_lse=True, skip_threshold=threshold, **options)
    tolerance = tolerances.attention(q, k, v, offset=0.03 * keys)
    share = keys * threshold
    assert (lse <= expected_lse + tolerance.lse_atol + 1e-5).all()
    assert (lse >= expected_lse - np.log1p(share) - tolerance.lse_atol - 1e-5).all()
    bound = 2 * share * np.abs(v).max() + tolerance.atol + tolerance.rtol * np.abs(expected)
    assert (np.abs(out - expected) <= bound).all()


# carried states


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_is_merge(rng, isa, rows, keys, dtype):
    q, k, v = qkv(rng, batch=2, rows=rows, keys=keys, value_dim=24, q_dtype=dtype)
    more = qkv(rng, batch=2, rows=rows, keys=50, value_dim=24, q_dtype=dtype)[1:]
    sinks = normal(rng, (4,))
    state = la.attention(q, *more, return_lse=True)
    merged = la.merge([state, la.attention(q, k, v, return_lse=True, causal=True, sinks=sinks)])
    same(q, k, v, la.attention(q, k, v, return_lse=True, causal=True, sinks=sinks, state=state), merged, offset=6.0)
    check(q, k, v, state=state, causal=True, sinks=sinks, offset=6.0)


@pytest.mark.parametrize("rows", [1, 20])
def test_a_chain_of_states_is_the_whole(rng, isa, rows):
    q, k, v = qkv(rng, rows=rows, keys=400)
    state = None
    for part in np.split(np.arange(400), [10, 10, 200, 333]):
        state = la.attention(q, k[:, :, part], v[:, :, part], return_lse=True, state=state)
    same(q, k, v, state, {})


@pytest.mark.parametrize("rows", [1, 20])
def test_empty_states_count_as_nothing(rng, isa, rows):
    q, k, v = qkv(rng, rows=rows, keys=70)
    nothing = np.full((1, 4, rows, 16), np.nan, np.float32), np.full((1, 4, rows), -np.inf, np.float32)
    equal(q, k, v, {"state": nothing}, {})
    state = la.attention(q, k, v, return_lse=True)
    out, lse = la.attention(q, k[:, :, :0], v[:, :, :0], state=state, return_lse=True)
    same(q, k, v, (out, lse), state)
    out, lse = la.attention(q, k[:, :, :0], v[:, :, :0], state=nothing, return_lse=True)
    assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("gap", [-300.0, 300.0])
def test_states_of_another_size(rng, isa, gap):
    q, k, v = qkv(rng, rows=20, keys=70)
    o, lse = la.attention(q, k, v, return_lse=True)
    check(q, k, v, state=(o, lse + np.float32(gap)), offset=abs(gap))


@pytest.mark.parametrize("dtype", [F16, BF16, np.float64], ids=str)
def test_dtypes_and_strides_of_states(rng, isa, dtype):
    q, k, v = qkv(rng, batch=2, rows=20, keys=70)
    o, lse = la.attention(q, k, v, return_lse=True)
    o, lse = o.astype(dtype).swapaxes(1, 2).copy().swapaxes(1, 2), lse.astype(np.float64)[:, ::-1].copy()[:, ::-1]
    equal(q, k, v, {"state": (o, lse)}, {"state": (o.astype(np.float32), lse.astype(np.float32))})


# together


def everything(rng, batch, rows, keys):
    return {
        "scale": rng.uniform(0.1, 0.5, (batch, 4, rows)),
        "softcap": 9.0,
        "bias": normal(rng, (batch, 1, 1, keys)),
        "mask": rng.random((rows, keys)) > 0.1,
        "alibi_slopes": np.full(4, 0.01),
        "sinks": normal(rng, (4,)),
        "relative_bias": normal(rng, (4, 40)),
        "relative_zero": 30,
        "segments": (rng.integers(0, 2, (batch, rows)), rng.integers(0, 2, keys)),
        "visible_until": rng.integers(keys - rows, keys + 5, keys),
        "state": (normal(rng, (batch, 4, rows, 16)), normal(rng, (batch, 4, rows))),
        "causal": True,
        "window": (keys // 2, -1),
    }


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_together(rng, isa, rows, keys, dtype):
    q, k, v = qkv(rng, batch=2, rows=rows, keys=keys, q_dtype=dtype)
    check(q, k, v, offset=40.0, **everything(rng, 2, rows, keys))


def test_bits_do_not_depend_on_threads(rng):
    q, k, v = qkv(rng, batch=2, rows=40, keys=3000)
    options = everything(rng, 2, 40, 3000) | {"skip_threshold": 0.01}
    results = on_threads(lambda: la.attention(q, k, v, **options), (1, 2))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_steps_are_the_last_rows_of_prefill(rng, isa, dtype):
    q, k, v = qkv(rng, rows=90, keys=90, q_dtype=dtype)
    scales, table = rng.uniform(0.1, 0.5, (4, 90)), normal(rng, (4, 30))
    numbers, until = runs(rng, 90, 4), np.arange(90) + rng.integers(1, 90, 90)
    own = {"causal": True, "relative_bias": table, "return_lse": True}
    whole, whole_lse = la.attention(q, k, v, scale=scales, segments=(numbers, numbers), visible_until=until, **own)
    tolerance = tolerances.same_storage(q, k, v, offset=5.0)
    for n in (1, 2, 17, 65, 90):
        last = slice(n - 1, n)
        step, lse = la.attention(
            q[:, :, last], k[:, :, :n], v[:, :, :n], scale=scales[:, last],
            segments=(numbers[last], numbers[:n]), visible_until=until[:n], **own,
        )  # fmt: skip
        tolerance.check(step, np.asarray(whole[:, :, last], np.float64), lse, whole_lse[:, :, last])


def test_rank_3(rng, isa):
    q, k, v = qkv(rng, rows=20, keys=67)
    options = everything(rng, 1, 20, 67) | {"scale": rng.uniform(0.1, 0.5, (4, 20))}
    o, lse = options["state"]
    whole = la.attention(q, k, v, **options)
    lone = options | {"state": (o[0], lse[0]), "bias": options["bias"][0]}
    np.testing.assert_array_equal(la.attention(q[0], k[0], v[0], **lone), whole[0])


def test_torch_tensors_are_taken(rng):
    torch = pytest.importorskip("torch")
    q, k, v = qkv(rng, batch=2, rows=20, keys=67)
    options = everything(rng, 2, 20, 67)
    given = {
        name: tuple(map(torch.from_numpy, value)) if name in ("segments", "state")
        else torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }  # fmt: skip
    out = la.attention(*map(torch.from_numpy, (q, k, v)), **given)
    np.testing.assert_array_equal(out.numpy(), la.attention(q, k, v, **options))


# packed sequences


@pytest.mark.parametrize("lengths", [([1, 1, 1], [300, 1, 65]), ([5, 0, 40], [90, 33, 300]), ([30], [9])], ids=str)
@pytest.mark.parametrize("option", ["scale", "relative_bias", "skip_threshold", "state"])
def test_varlen(rng, isa, lengths, option):
    cu_q, cu_k = (np.cumsum([0, *n]) for n in lengths)
    q, k, v = (normal(rng, (cu[-1], heads, 16)) for cu, heads in ((cu_q, 4), (cu_k, 2), (cu_k, 2)))
    packed, packed_lse = normal(rng, (cu_q[-1], 4, 16)), normal(rng, (4, cu_q[-1]))
    value = {
        "scale": rng.uniform(0.1, 0.5, 4),
        "relative_bias": normal(rng, (4, 40)),
        "skip_threshold": 0.1,
        "state": (packed, packed_lse),
    }[option]
    out, lse = la.attention_varlen(q, k, v, cu_q, cu_k, causal=True, return_lse=True, **{option: value})
    if option != "skip_threshold":
        expected = reference.attention_varlen(q, k, v, cu_q, cu_k, causal=True, return_lse=True, **{option: value})
        tolerance = tolerances.attention(*(x.swapaxes(0, 1) for x in (q, k, v)), offset=10.0)
        tolerance.check(out, expected[0], lse, expected[1])
    for n in range(len(lengths[0])):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        own = (packed[rows].swapaxes(0, 1), packed_lse[:, rows]) if option == "state" else value
        parts = [x.swapaxes(0, 1) for x in (q[rows], k[keys], v[keys])]
        one, one_lse = la.attention(*parts, causal=True, return_lse=True, **{option: own})
        same(*parts, (out[rows].swapaxes(0, 1), lse[:, rows]), (one, one_lse), offset=10.0)


def test_relative_bias_with_a_zero_in_packed_sequences(rng, isa):
    q = k = v = normal(rng, (70, 4, 16))
    ends = np.array([0, 20, 70])
    options = {"relative_bias": normal(rng, (4, 15)), "relative_zero": 6, "return_lse": True}
    out, lse = la.attention_varlen(q, k, v, ends, ends, **options)
    expected, expected_lse = reference.attention_varlen(q, k, v, ends, ends, **options)
    tolerances.attention(*[q.swapaxes(0, 1)] * 3, offset=5.0).check(out, expected, lse, expected_lse)
