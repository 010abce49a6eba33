"""`local_linear_attention`."""

import numpy as np
import pytest

import longattn as la
from longattn.linear import local_linear_attention
from longattn.reference import linear as reference
from random_arrays import DTYPES, F64, LAYOUTS, qkv

oracle = reference.local_linear_attention
#: Enough steps for the residual to reach rounding: as many as there are channels, and some.
SOLVED = {"steps": 40, "tolerance": 1e-6}


def compare(q, k, v, ridge, *, rtol=2e-3, **options):
    """The fit divides by `1 - mu . rho`, at worst of the size of the ridge over the spread of the keys."""
    solved = SOLVED | {"tolerance": 1e-9} if q.dtype == F64 else SOLVED
    out = local_linear_attention(q, k, v, ridge, **solved, **options)
    expected = oracle(q, k, v, ridge, **options)
    assert out.dtype == q.dtype and out.shape == expected.shape
    storage = 2 * float(np.finfo(np.float32 if q.dtype.itemsize > 2 else np.float16).eps)
    if q.dtype.name == "bfloat16":
        storage = 2.0**-7
    error = np.abs(out.astype(np.float64) - expected)
    assert error.max(initial=0) <= (rtol + storage) * max(np.abs(expected).max(initial=0), 1e-30)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (5, 37), (70, 70)])
def test_reference(rng, isa, causal, lengths):
    q, k, v = qkv(rng, batch=2, rows=lengths[0], keys=lengths[1], dim=12, value_dim=21)
    compare(q, k, v, 0.5, causal=causal)


@pytest.mark.parametrize("shape", [(4,), (4, 20), (2, 4, 20)])
def test_ridges(rng, shape):
    q, k, v = qkv(rng, batch=2, rows=20, keys=30)
    compare(q, k, v, rng.uniform(0.3, 2, shape).astype(np.float32))


@pytest.mark.parametrize("dtype", [*DTYPES, F64], ids=str)
def test_dtypes(rng, dtype):
    q, k, v = qkv(rng, rows=20, keys=30, q_dtype=dtype)
    compare(q, k, v, 0.5, rtol=1e-5 if dtype == F64 else 2e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    q, k, v = qkv(rng, rows=20, keys=30, layout=layout)
    out = compare(q, k, v, 0.5)
    given = np.empty_like(out)
    assert local_linear_attention(q, k, v, 0.5, **SOLVED, out=given) is given
    np.testing.assert_array_equal(given, out)


def test_what_is_reported(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    out, stats = local_linear_attention(q, k, v, 0.5, return_stats=True)
    assert 1 <= stats.steps <= 16 and 0 < stats.residual < 0.1
    np.testing.assert_array_equal(out, local_linear_attention(q, k, v, 0.5))
    _, few = local_linear_attention(q, k, v, 0.5, steps=2, return_stats=True)
    assert few.steps == 2 and few.residual > stats.residual


def test_threads(rng, threads):
    q, k, v = qkv(rng, rows=300, keys=300)
    out = local_linear_attention(q, k, v, 0.5)
    la.set_num_threads(1)
    np.testing.assert_array_equal(local_linear_attention(q, k, v, 0.5), out)
    la.set_num_threads(threads)


def test_no_keys(rng):
    q, k, v = qkv(rng, rows=3, keys=0)
    assert not local_linear_attention(q, k, v, 1.0).any()
    q, k, v = qkv(rng, rows=5, keys=3)
    assert not local_linear_attention(q, k, v, 1.0, causal=True)[:, :, :2].any()


def test_bad_input(rng):
    q, k, v = qkv(rng)
    for ridge, options, match in (
        (0.0, {}, "ridge: got numbers"),
        (np.ones(3, np.float32), {}, "ridge: got shape"),
        (1.0, {"scale": 0.0}, "scale: got 0"),
        (1.0, {"steps": 0}, "steps: got 0"),
        (1.0, {"tolerance": 1.0}, "tolerance: got 1"),
    ):
        with pytest.raises(ValueError, match=match):
            local_linear_attention(q, k, v, ridge, **options)


# Identities


def test_a_large_ridge_is_softmax_attention(rng):
    q, k, v = qkv(rng, rows=20, keys=30)
    np.testing.assert_allclose(local_linear_attention(q, k, v, 1e8), la.attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_affine_values_are_continued(rng):
    """In float64, as the ridge must be small beside the spread of the keys."""
    q, k, _ = qkv(rng, heads=2, rows=20, keys=60, dim=6, q_dtype=F64)
    matrix, shift = rng.standard_normal((6, 5)), rng.standard_normal(5)
    out = local_linear_attention(q, k, k @ matrix + shift, 1e-9, steps=60, tolerance=1e-10)
    np.testing.assert_allclose(out, q @ matrix + shift, rtol=1e-5, atol=1e-5)


def test_a_small_scale_is_least_squares(rng):
    q, k, v = qkv(rng, heads=2, rows=5, keys=60, dim=6, q_dtype=F64)
    out = local_linear_attention(q, k, v, 1e-9, scale=1e-7, steps=60, tolerance=1e-10)
    for h in range(2):
        design = np.concatenate([k[0, h], np.ones((60, 1))], axis=1)
        fit, *_ = np.linalg.lstsq(design, v[0, h], rcond=None)
        expected = np.concatenate([q[0, h], np.ones((5, 1))], axis=1) @ fit
        np.testing.assert_allclose(out[0, h], expected, rtol=1e-4, atol=1e-4)


def test_queries_one_by_one(rng):
    """A query's result does not depend on those that are computed with it."""
    q, k, v = qkv(rng, rows=12, keys=30)
    whole = local_linear_attention(q, k, v, 0.5, causal=True, **SOLVED)
    for i in range(12):
        seen = 30 - 12 + i + 1
        one = local_linear_attention(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen], 0.5, causal=True, **SOLVED)
        np.testing.assert_allclose(one[:, :, 0], whole[:, :, i], rtol=2e-3, atol=2e-3)


def test_equal_values(rng):
    q, k, v = qkv(rng, heads=2, rows=20, keys=30)
    v[:] = v[:, :, :1]
    out = local_linear_attention(q, k, v, 0.5)
    np.testing.assert_allclose(out, np.broadcast_to(v[:, :, :1], out.shape), rtol=1e-3, atol=1e-3)
