"""Attention over float64 arrays: float64 arithmetic throughout."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import F64, LAYOUTS, lay, normal, qkv
from running import on_threads


def check(q, k, v, *, offset=0.0, **options):
    out, lse = la.attention(q, k, v, return_lse=True, **options)
    assert out.dtype == lse.dtype == np.float64 and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    scale = options.get("scale")
    scale = None if scale is None else float(np.max(np.abs(scale)))
    tolerances.attention(q, k, v, scale=scale, offset=offset).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (3, 40), (64, 64), (192, 128)])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 300), (31, 65), (33, 64), (70, 63), (40, 9)])
def test_shapes(rng, isa, dim, value_dim, rows, keys):
    arrays = qkv(rng, batch=2, rows=rows, keys=keys, dim=dim, value_dim=value_dim, q_dtype=F64)
    check(*arrays)
    check(*arrays, causal=True)


@pytest.mark.parametrize("options", [
    {"window": (5, 3)}, {"window": (0, 0), "causal": True}, {"scale": -0.4}, {"softcap": 2.0},
    {"scale": 3.0, "softcap": 0.1},
])  # fmt: skip
def test_options(rng, isa, options):
    check(*qkv(rng, rows=40, keys=90, q_dtype=F64), **options)


def test_bias_mask_slopes_and_sinks(rng, isa):
    q, k, v = qkv(rng, batch=2, rows=20, keys=67, q_dtype=F64)
    for shape in ((2, 4, 20, 67), (67,), (4, 20, 1), ()):
        bias = np.asarray(normal(rng, shape, F64))
        check(q, k, v, bias=bias, offset=4.0)
        check(q, k, v, mask=np.asarray(bias > 0), causal=True)
    check(q, k, v, bias=normal(rng, (20, 67)), offset=4.0)  # float32, exactly
    check(q, k, v, alibi_slopes=rng.random((2, 4)), offset=67.0)
    check(q, k, v, sinks=np.array([1.0, -2.0, 30.0, -np.inf]), causal=True)


def test_scales_tables_segments_and_visibility(rng, isa):
    q, k, v = qkv(rng, batch=2, rows=20, keys=67, q_dtype=F64)
    for shape in ((4,), (4, 20), (2, 4, 20)):
        check(q, k, v, scale=rng.random(shape))
    table = normal(rng, (4, 9), F64)
    check(q, k, v, relative_bias=table, offset=4.0)
    check(q, k, v, relative_bias=table, relative_zero=4, causal=True, offset=4.0)
    check(q, k, v, segments=(rng.integers(0, 3, (2, 20)), rng.integers(0, 3, 67)))
    check(q, k, v, visible_until=rng.integers(20, 90, (2, 67)), causal=True)
    exact = la.attention(q, k, v)
    np.testing.assert_array_equal(la.attention(q, k, v, skip_threshold=0.5), exact)  # leaves out nothing


def test_state(rng, isa):
    q, k, v = qkv(rng, batch=2, rows=20, keys=67, q_dtype=F64)
    o, lse = la.attention(q, k[:, :, :40], v[:, :, :40], return_lse=True)
    o[:, :, 3], lse[:, :, 3] = np.nan, -np.inf
    mask = np.ones((20, 27), bool)
    mask[5] = False
    state = o, lse
    check(q, k[:, :, 40:], v[:, :, 40:], state=state, mask=mask, sinks=np.zeros(4))
    got = la.attention(q[0], k[0, :, 40:], v[0, :, 40:], state=(o[0], lse[0]))
    np.testing.assert_array_equal(got, la.attention(q, k[:, :, 40:], v[:, :, 40:], state=state)[0])


def test_groups(rng, isa):
    for heads, kv_heads in ((7, 1), (6, 3), (8, 8)):
        check(*qkv(rng, heads=heads, kv_heads=kv_heads, rows=9, keys=45, q_dtype=F64), causal=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_out(rng, isa, layout):
    q, k, v = qkv(rng, batch=2, rows=20, keys=67, q_dtype=F64, layout=layout)
    expected = la.attention(*(np.ascontiguousarray(x) for x in (q, k, v)))
    np.testing.assert_array_equal(la.attention(q, k, v), expected)
    if layout in ("contiguous", "blhd", "sliced", "fused", "reversed"):
        out = lay(np.full(expected.shape, np.nan), layout)
        assert la.attention(q, k, v, out=out) is out
        np.testing.assert_array_equal(out, expected)


def test_rank_3(rng, isa):
    q, k, v = qkv(rng, rows=6, keys=40, q_dtype=F64)
    out, lse = la.attention(q[0], k[0], v[0], return_lse=True)
    whole = la.attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(out, whole[0][0])
    np.testing.assert_array_equal(lse, whole[1][0])


def test_step_equals_prefill(rng, isa):
    q, k, v = qkv(rng, rows=40, keys=40, q_dtype=F64)
    whole = la.attention(q, k, v, causal=True)
    for n in (1, 17, 40):
        step = la.attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], causal=True)
        tolerances.same_storage(q, k, v).check(step, whole[:, :, n - 1 : n])


def test_rows_without_keys_and_hidden_nan(rng, isa):
    q, k, v = qkv(rng, rows=20, keys=67, q_dtype=F64)
    mask = rng.random((20, 67)) > 0.5
    mask[3] = False
    mask[:, 30:40] = False
    clean = la.attention(q, k, v, mask=mask, return_lse=True)
    assert (clean[0][..., 3, :] == 0).all() and (clean[1][..., 3] == -np.inf).all()
    k[..., 30:40, :] = np.nan
    v[..., 30:40, :] = np.inf
    for got, want in zip(la.attention(q, k, v, mask=mask, return_lse=True), clean, strict=True):
        np.testing.assert_array_equal(got, want)
    k[..., 5, :] = np.nan
    out = la.attention(q, k, v, mask=mask)
    np.testing.assert_array_equal(np.isnan(out).all(axis=-1), np.broadcast_to(mask[:, 5], (1, 4, 20)))


def test_empty(rng):
    for rows, keys in ((0, 5), (5, 0)):
        out, lse = la.attention(*qkv(rng, rows=rows, keys=keys, q_dtype=F64), return_lse=True)
        assert out.shape == (1, 4, rows, 16) and (out == 0).all() and (lse == -np.inf).all()


def test_the_same_bits_on_any_number_of_threads(rng, isa):
    q, k, v = qkv(rng, rows=300, keys=500, q_dtype=F64)
    results = on_threads(lambda: la.attention(q, k, v, causal=True))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_close_to_float32(rng, isa):
    arrays = qkv(rng, rows=40, keys=300, q_dtype=F64)
    single = [x.astype(np.float32) for x in arrays]
    tolerance = tolerances.attention(*single)
    tolerance.check(la.attention(*single), la.attention(*(x.astype(np.float64) for x in single)))


def test_all_three_or_none(rng):
    q, k, v = qkv(rng, q_dtype=F64)
    single = [x.astype(np.float32) for x in (q, k, v)]
    for n, name in enumerate("qkv"):
        mixed = [*single]
        mixed[n] = (q, k, v)[n]
        with pytest.raises(TypeError, match=rf"^{name}: got dtype float64"):
            la.attention(*mixed)
        mixed = [q, k, v]
        mixed[n] = single[n]
        with pytest.raises(
            TypeError,
            match="got dtype float64, expected float32, float16 or bfloat16, or float64 for all of q, k and v",
        ):
            la.attention(*mixed)
