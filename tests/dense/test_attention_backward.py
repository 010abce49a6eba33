"""Gradients of attention against their float64 reference, and the identities they obey."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F32, F64, LAYOUTS, lay, normal, qkv
from running import on_threads

backward = la.dense.attention_backward


def saved(q, k, v, **options):
    """Output and lse of a forward call, ours and the reference's."""
    return (
        la.attention(q, k, v, return_lse=True, **options),
        reference.attention(q, k, v, return_lse=True, **options),
    )


def allowed(q, k, v, d_out, *, d_lse=None, offset=0.0, **options):
    """Tolerance of the gradients of a call."""
    weights, lse = reference.attention(q, k, np.broadcast_to(np.eye(k.shape[-2]), (*k.shape[:-1], k.shape[-2])),
                                       return_lse=True, **options)  # fmt: skip
    sinks = options.get("sinks")
    share = None if sinks is None else np.exp(np.asarray(sinks, np.float64)[:, None] - lse)
    return tolerances.attention_backward(
        q, k, v, d_out, weights=weights, sink_weights=share, d_lse=d_lse, scale=options.get("scale"), offset=offset
    )


def check(rng, q, k, v, *, offset=0.0, **options):
    """Compare all gradients with the reference's."""
    (out, lse), expected = saved(q, k, v, **options)
    d_out, d_lse = normal(rng, out.shape, out.dtype), normal(rng, lse.shape, lse.dtype)
    more = {"d_lse": d_lse, "return_d_sinks": "sinks" in options, **options}
    ours = backward(d_out, q, k, v, out, lse, **more)
    theirs = reference.attention_backward(d_out, q, k, v, *expected, **more)
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    assert [x.dtype for x in ours[:3]] == [x.dtype for x in (q, k, v)]
    allowed(q, k, v, d_out, d_lse=d_lse, offset=offset, **options).check(ours, theirs)


def test_reference_is_the_derivative(rng):
    """The oracle itself, against central differences."""
    q, k, v = qkv(rng, rows=3, keys=5, dim=4, value_dim=3, q_dtype=F64)
    options = {"causal": True, "window": (2, -1), "softcap": 1.5, "sinks": normal(rng, (4,), F64), "scale": 0.7}
    out, lse = reference.attention(q, k, v, return_lse=True, **options)
    d_out, d_lse = normal(rng, out.shape, F64), normal(rng, lse.shape, F64)
    gradients = reference.attention_backward(d_out, q, k, v, out, lse, d_lse=d_lse, return_d_sinks=True, **options)

    def value():
        o, total = reference.attention(q, k, v, return_lse=True, **options)
        return (o * d_out).sum() + (total * d_lse).sum()

    step = 1e-6
    for x, gradient in zip((q, k, v, options["sinks"]), gradients, strict=True):
        for index in np.ndindex(x.shape):
            x[index] += step
            up = value()
            x[index] -= 2 * step
            down = value()
            x[index] += step
            np.testing.assert_allclose(gradient[index], (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("dim", "value_dim"), [(1, 1), (3, 5), (16, 16), (40, 24), (64, 64), (80, 130), (128, 128), (576, 512)]
)
def test_head_dims(rng, isa, dim, value_dim):
    check(rng, *qkv(rng, rows=19, keys=33, dim=dim, value_dim=value_dim), causal=True)


@pytest.mark.parametrize("keys", [1, 2, 15, 17, 64, 256, 257, 600])
@pytest.mark.parametrize("rows", [1, 11, 13, 95, 97])
def test_ragged_lengths(rng, isa, rows, keys):
    arrays = qkv(rng, heads=2, kv_heads=1, rows=rows, keys=keys, dim=24)
    check(rng, *arrays, causal=(rows + keys) % 2 == 0)


@pytest.mark.parametrize("causal", [False, True])
def test_several_tiles_and_blocks(rng, isa, causal):
    check(rng, *qkv(rng, heads=2, kv_heads=1, rows=400, keys=600, dim=40), causal=causal)


@pytest.mark.parametrize("q_dtype", [*DTYPES, F64], ids=str)
@pytest.mark.parametrize("kv_dtype", [*DTYPES, F64], ids=str)
def test_dtypes(rng, isa, q_dtype, kv_dtype):
    if (q_dtype == F64) != (kv_dtype == F64):
        q, k, v = qkv(rng, q_dtype=q_dtype, kv_dtype=kv_dtype)
        with pytest.raises(TypeError, match="or float64 for all of q, k and v"):
            backward(q, q, k, v, q, q[..., 0])
        return
    check(rng, *qkv(rng, batch=2, rows=40, keys=129, dim=72, q_dtype=q_dtype, kv_dtype=kv_dtype), causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 3), (7, 1), (16, 2)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_groups(rng, isa, heads, kv_heads, dtype):
    """Gradients of shared keys are sums over the heads that share them."""
    q, k, v = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=9, keys=45, dim=32, q_dtype=dtype)
    check(rng, q, k, v, causal=True)
    group = heads // kv_heads
    repeated = [np.repeat(x, group, axis=1) for x in (k, v)]
    out, lse = la.attention(q, k, v, return_lse=True)
    d_out = normal(rng, out.shape, dtype)
    dq, dk, dv = backward(d_out, q, k, v, out, lse)
    each = backward(d_out, q, *repeated, out, lse)
    each = each[0], *(x.reshape(2, kv_heads, group, 45, 32).sum(axis=2) for x in each[1:])
    allowed(q, k, v, d_out).check((dq, dk, dv), each)


WINDOWS = [(0, 0), (3, -1), (-1, 2), (64, 0), (200, 3)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("rows", "keys"), [(1, 100), (130, 300), (270, 270), (40, 9)])
@pytest.mark.parametrize("causal", [False, True])
def test_windows(rng, isa, window, rows, keys, causal):
    check(rng, *qkv(rng, heads=2, kv_heads=1, rows=rows, keys=keys, dim=8), window=window, causal=causal)


@pytest.mark.parametrize("window", WINDOWS)
def test_windows_in_float64(rng, window):
    for rows, keys in ((1, 100), (70, 130), (40, 9)):
        check(rng, *qkv(rng, rows=rows, keys=keys, dim=8, q_dtype=F64), window=window, causal=rows > 1)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.3, -0.5])
@pytest.mark.parametrize("softcap", [0.0, 0.5, 20.0])
def test_scale_and_softcap(rng, isa, dtype, scale, softcap):
    check(rng, *qkv(rng, rows=40, keys=90, q_dtype=dtype, spread=3.0), scale=scale, softcap=softcap, causal=True)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 20, 67), (20, 67), (67,), (4, 20, 1), (1, 1, 1, 1)], ids=str)
def test_bias_and_mask(rng, isa, dtype, shape):
    q, k, v = qkv(rng, batch=2, rows=20, keys=67, q_dtype=dtype)
    bias = np.asarray(normal(rng, shape, dtype))
    check(rng, q, k, v, causal=True, bias=bias, mask=np.asarray(bias > -0.3), offset=float(np.abs(bias).max()))
    lowest = np.where(bias > -0.3, bias, -np.inf)
    check(rng, q, k, v, bias=lowest, offset=float(np.abs(bias).max()))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_alibi_and_sinks(rng, isa, dtype):
    q, k, v = qkv(rng, batch=2, rows=30, keys=67, q_dtype=dtype)
    sinks = np.array([0.5, -3.0, 4.0, -np.inf], dtype)
    for slopes in (2.0 ** -np.arange(1, 5), rng.random((2, 4))):
        check(rng, q, k, v, alibi_slopes=slopes.astype(dtype), sinks=sinks, causal=True, offset=67.0)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(4,), (4, 30), (2, 4, 30)], ids=str)
def test_scales_of_rows(rng, isa, dtype, shape):
    q, k, v = qkv(rng, batch=2, rows=30, keys=67, q_dtype=dtype)
    check(rng, q, k, v, scale=rng.random(shape).astype(dtype), softcap=3.0, causal=True)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_relative_bias_segments_and_visibility(rng, isa, dtype):
    q, k, v = qkv(rng, batch=2, rows=30, keys=67, q_dtype=dtype)
    table = normal(rng, (4, 9), dtype)
    check(rng, q, k, v, relative_bias=table, offset=4.0)
    check(rng, q, k, v, relative_bias=table, relative_zero=4, causal=True, offset=4.0)
    check(rng, q, k, v, segments=(rng.integers(0, 3, (2, 30)), rng.integers(0, 3, 67)))
    check(rng, q, k, v, visible_until=rng.integers(20, 90, (2, 67)), window=(40, 3))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_state_takes_its_share(rng, isa, dtype):
    """With the output and lse that include a state, gradients are those of the keys' part in the merged whole."""
    q, k, v = qkv(rng, rows=20, keys=67, q_dtype=dtype)
    _, more_k, more_v = qkv(rng, rows=20, keys=30, q_dtype=dtype)
    state = la.attention(q, more_k, more_v, return_lse=True)
    out, lse = la.attention(q, k, v, state=state, return_lse=True)
    every = [np.concatenate(pair, axis=-2) for pair in ((k, more_k), (v, more_v))]
    d_out = normal(rng, out.shape, dtype)
    _, dk, dv = backward(d_out, q, k, v, out, lse)
    _, *want = backward(d_out, q, *every, *la.attention(q, *every, return_lse=True))
    limits = allowed(q, *every, d_out)
    both = tolerances.Gradients(tuple(2 * x[..., :67, :] for x in limits.allowed[1:3]), (2 * limits.roundoff[1],) * 2)
    both.check((dk, dv), [x[..., :67, :] for x in want])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_layouts(rng, isa, layout, dtype):
    q, k, v = qkv(rng, batch=2, rows=20, keys=67, dim=20, q_dtype=dtype, layout=layout)
    (out, lse), _ = saved(q, k, v)
    d_out = normal(rng, out.shape, dtype, layout)
    ours = backward(d_out, q, k, v, lay(out.copy(), "blhd"), lse)
    contiguous = [np.ascontiguousarray(x) for x in (d_out, q, k, v, out)]
    for got, want in zip(ours, backward(*contiguous, lse), strict=True):
        np.testing.assert_array_equal(got, want)


def test_rank_3_and_expanded_gradient(rng, isa):
    q, k, v = qkv(rng, rows=6, keys=40)
    out, lse = la.attention(q, k, v, return_lse=True)
    whole = backward(np.broadcast_to(np.float32(2), out.shape), q, k, v, out, lse)
    part = backward(np.full_like(out[0], 2), q[0], k[0], v[0], out[0], lse[0])
    for got, want in zip(part, whole, strict=True):
        np.testing.assert_array_equal(got, want[0])


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_rows_without_keys_have_no_part(rng, isa, dtype):
    q, k, v = qkv(rng, rows=20, keys=67, q_dtype=dtype)
    mask = rng.random((20, 67)) > 0.4
    mask[3:9] = False
    mask[:, 11] = False
    out, lse = la.attention(q, k, v, mask=mask, return_lse=True)
    q[..., 3:9, :] = np.nan  # nor may what they hold get anywhere
    d_out = normal(rng, out.shape, dtype)
    d_out[..., 3:9, :] = np.nan
    d_lse = np.where(lse == -np.inf, np.nan, 1.0).astype(lse.dtype)
    dq, dk, dv = backward(d_out, q, k, v, out, lse, d_lse=d_lse, mask=mask)
    assert (dq[..., 3:9, :] == 0).all() and (dk[..., 11, :] == 0).all() and (dv[..., 11, :] == 0).all()
    q[..., 3:9, :] = d_out[..., 3:9, :] = 0
    d_lse = np.nan_to_num(d_lse)
    clean = reference.attention_backward(
        d_out, q, k, v, *reference.attention(q, k, v, mask=mask, return_lse=True), d_lse=d_lse, mask=mask
    )
    allowed(q, k, v, d_out, d_lse=d_lse, mask=mask).check((dq, dk, dv), clean)


@pytest.mark.parametrize("where", ["q", "k", "v", "d_out"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_nan_reaches_what_sees_it_alone(rng, isa, where, value, dtype):
    rows, keys, at = 130, 300, 41
    arrays = dict(zip("qkv", qkv(rng, heads=2, kv_heads=1, rows=rows, keys=keys, q_dtype=dtype), strict=True))
    mask = rng.random((rows, keys)) > 0.5
    d_out = normal(rng, (1, 2, rows, 16), dtype)
    target = d_out if where == "d_out" else arrays[where]
    if where in ("q", "d_out"):
        target[:, 0, at] = value
        bad_rows = np.zeros((2, rows), bool)
        bad_rows[0, at] = True
    else:
        target[:, :, at] = value
        bad_rows = np.broadcast_to(mask[:, at], (2, rows))
    out, lse = la.attention(**arrays, mask=mask, return_lse=True)
    dq, dk, dv = backward(d_out, *arrays.values(), out, lse, mask=mask)
    touched = (mask[None] & bad_rows[..., None]).any(axis=(0, 1))  # keys that a bad row sees
    np.testing.assert_array_equal(~np.isfinite(dq[0]).all(axis=-1), bad_rows)
    np.testing.assert_array_equal(~np.isfinite(dk[0, 0]).all(axis=-1), touched)
    if where != "v":  # the values' gradient does not depend on the values
        np.testing.assert_array_equal(~np.isfinite(dv[0, 0]).all(axis=-1), touched)


def test_empty(rng, isa):
    for dtype in (F32, F64):
        for rows, keys in ((0, 5), (5, 0), (0, 0)):
            q, k, v = qkv(rng, rows=rows, keys=keys, q_dtype=dtype)
            out, lse = la.attention(q, k, v, return_lse=True)
            for got, x in zip(backward(out, q, k, v, out, lse), (q, k, v), strict=True):
                assert got.shape == x.shape and (got == 0).all()


def test_weights_of_a_row_sum_to_one(rng, isa):
    """With d_out of ones dv sums to the number of rows, and shifting all keys changes nothing."""
    q, k, v = qkv(rng, rows=50, keys=300, dim=16)
    out, lse = la.attention(q, k, v, causal=True, return_lse=True)
    _, _, dv = backward(np.ones_like(out), q, k, v, out, lse, causal=True)
    np.testing.assert_allclose(dv.sum(axis=-2), 100, rtol=1e-5)
    dq, _, _ = backward(
        normal(rng, out.shape), q, np.ones_like(k), v, *la.attention(q, np.ones_like(k), v, return_lse=True)
    )
    np.testing.assert_allclose(dq, 0, atol=2e-5)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_parts_with_their_lse_make_the_whole(rng, isa, dtype):
    """The gradient through `merge` of two halves of the keys is that of the whole."""
    q, k, v = qkv(rng, rows=70, keys=400, q_dtype=dtype)
    out, lse = la.attention(q, k, v, return_lse=True)
    d_out = normal(rng, out.shape, dtype)
    dq, dk, dv = backward(d_out, q, k, v, out, lse)
    parts = []
    for keys in (slice(0, 150), slice(150, 400)):
        o, part = la.attention(q, k[:, :, keys], v[:, :, keys], return_lse=True)
        weight = np.exp(part - lse)
        d_lse = weight * (d_out * (o - out)).sum(axis=-1)
        parts.append(
            backward((weight[..., None] * d_out).astype(dtype), q, k[:, :, keys], v[:, :, keys], o, part, d_lse=d_lse)
        )
    (dq1, dk1, dv1), (dq2, dk2, dv2) = parts
    merged = dq1 + dq2, np.concatenate([dk1, dk2], axis=-2), np.concatenate([dv1, dv2], axis=-2)
    change = np.linalg.norm(d_out, axis=-1) * np.linalg.norm(v, axis=-1).max()
    allowed(q, k, v, d_out, d_lse=change).check((dq, dk, dv), merged)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen(rng, isa, dtype):
    bounds_q, bounds_k = np.array([0, 7, 7, 140]), np.array([0, 30, 40, 340])
    q, k, v = (normal(rng, (n, heads, 24), dtype) for n, heads in ((140, 4), (340, 2), (340, 2)))
    sinks, slopes = normal(rng, (4,)), rng.random(4, np.float32)
    options = {"causal": True, "window": (90, 0), "softcap": 4.0, "alibi_slopes": slopes, "sinks": sinks}
    out, lse = la.attention_varlen(q, k, v, bounds_q, bounds_k, return_lse=True, **options)
    d_out, d_lse = normal(rng, out.shape, dtype), normal(rng, lse.shape)
    dq, dk, dv, d_sinks = la.dense.attention_varlen_backward(
        d_out, q, k, v, out, lse, bounds_q, bounds_k, d_lse=d_lse, return_d_sinks=True, **options
    )
    total = np.zeros(4)
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        one = [
            x[a:b].swapaxes(0, 1) for x, a, b in ((d_out, q0, q1), (q, q0, q1), (k, k0, k1), (v, k0, k1), (out, q0, q1))
        ]
        want = backward(*one, lse[:, q0:q1], d_lse=d_lse[:, q0:q1], return_d_sinks=True, **options)
        for got, x in zip((dq[q0:q1], dk[k0:k1], dv[k0:k1]), want[:3], strict=True):
            np.testing.assert_array_equal(got.swapaxes(0, 1), x)
        total += want[3]
    np.testing.assert_allclose(d_sinks, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("heads", [(8, 2), (1, 1)])
def test_the_same_bits_on_any_number_of_threads(rng, isa, dtype, heads):
    q, k, v = qkv(rng, heads=heads[0], kv_heads=heads[1], rows=200, keys=700, dim=24, q_dtype=dtype)
    sinks = normal(rng, (heads[0],))
    out, lse = la.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    results = on_threads(
        lambda: backward(out, q, k, v, out, lse, causal=True, sinks=sinks, return_d_sinks=True), (1, 2, 3, 5)
    )
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), two.view(np.uint8))


def test_inputs_are_not_written(rng, isa):
    for dtype in (F32, F64):
        q, k, v = qkv(rng, rows=20, keys=67, q_dtype=dtype)
        out, lse = la.attention(q, k, v, return_lse=True)
        arrays = [normal(rng, out.shape, dtype), q, k, v, out, lse]
        before = [x.copy() for x in arrays]
        for x in arrays:
            x.flags.writeable = False
        backward(*arrays, causal=True, d_lse=arrays[-1])
        for x, y in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(x, y)


MEMORY = """
import resource
import numpy as np
import longattn as la
length = 8192
q, k, v, d_out = np.random.default_rng(0).standard_normal((4, 1, length, 64), dtype=np.float32)
la.set_num_threads(2)
out, lse = la.attention(q, k, v, causal=True, return_lse=True)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
la.dense.attention_backward(d_out, q, k, v, out, lse, causal=True)
grown, scores = peak() - before, 4 * length * length
assert grown < scores / 8, f"{grown / 2**20:.0f} MiB, all scores take {scores / 2**20:.0f}"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak's unit is Linux's")
def test_memory_is_linear_in_the_length():
    """No matrix of scores: at 8,192 rows it would take 256 MiB."""
    subprocess.run([sys.executable, "-c", MEMORY], check=True, timeout=120)


Q, K, V = (np.ones(shape, np.float32) for shape in ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6)))
GOOD = {
    "d_out": np.ones((2, 4, 3, 6), np.float32),
    "q": Q,
    "k": K,
    "v": V,
    "out": np.ones((2, 4, 3, 6), np.float32),
    "lse": np.zeros((2, 4, 3), np.float32),
}
BAD = [
    ("d_out", None, TypeError, "got NoneType"),
    ("d_out", np.ones((2, 4, 3, 8), np.float32), ValueError, "got shape (2, 4, 3, 8), expected (2, 4, 3, 6)"),
    ("d_out", np.ones((2, 4, 3, 6)), TypeError, "got dtype float64, expected float32 as q"),
    ("out", np.ones((2, 4, 3, 6), ml_dtypes.bfloat16), TypeError, "got dtype bfloat16, expected float32 as q"),
    ("out", np.ones((4, 3, 6), np.float32), ValueError, "got shape (4, 3, 6)"),
    ("lse", np.zeros((2, 4), np.float32), ValueError, "got shape (2, 4), expected (2, 4, 3)"),
    ("lse", np.zeros((2, 4, 3), int), TypeError, "got dtype int64, expected a floating dtype"),
    ("d_lse", np.zeros((2, 4, 3, 1), np.float32), ValueError, "got shape (2, 4, 3, 1)"),
    ("q", Q[0], ValueError, "expected rank"),
    ("k", K[:1], ValueError, "got batch 1, expected 2 as in q"),
    ("v", V[:, :, :4], ValueError, "got length 4, expected 5 as in k"),
    ("causal", 1, TypeError, "expected True or False"),
    ("window", (1,), TypeError, "expected a pair"),
    ("scale", np.nan, ValueError, "expected a finite float32"),
    ("softcap", -1.0, ValueError, "expected 0 (off)"),
    ("bias", np.ones((3, 4), np.float32), ValueError, "expected one that broadcasts"),
    ("mask", np.ones((3, 5)), TypeError, "expected bool"),
    ("alibi_slopes", np.ones(3), ValueError, "got shape (3,)"),
    ("sinks", np.ones(2), ValueError, "got shape (2,)"),
    ("return_d_sinks", True, ValueError, "got True without sinks"),
    ("return_d_sinks", 1, TypeError, "expected True or False"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "value", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_refuses(argument, value, error, message):
    with pytest.raises(error) as caught:
        backward(**{**GOOD, argument: value})
    text = str(caught.value)
    assert message in text, text
    assert argument == "q" or text.startswith(argument), text
