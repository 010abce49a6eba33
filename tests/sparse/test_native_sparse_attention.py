"""`native_sparse_attention` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import native_sparse_attention
from random_arrays import BF16, DTYPES, LAYOUTS, normal, qkv

SMALL = {"block": 8, "stride": 4, "select_block": 16, "n_select": 3, "n_local": 1, "window": 20}


def only(part, q):
    """Gates of one part."""
    return np.broadcast_to(np.eye(3, dtype=np.float32)[part], (*q.shape[:3], 3))


def check(q, k, v, gates, **options):
    out = native_sparse_attention(q, k, v, gates, **SMALL | options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected = reference.native_sparse_attention(q, k, v, gates, **SMALL | options)
    one = tolerances.attention(q, k, v)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=9 * one.atol, rtol=3 * one.rtol)
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "rows", "keys"), [(1, 1, 100, 100), (6, 2, 40, 131), (8, 2, 1, 90)])
def test_reference(rng, isa, heads, kv_heads, rows, keys):
    q, k, v = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys, value_dim=12, spread=2.0)
    gates = rng.random((2, heads, rows, 3)).astype(np.float32)
    check(q, k, v, gates)
    check(q, k, v, gates, n_sink=0, n_local=2, stride=8)
    check(q, k, v, gates, block=16, select_block=8, n_select=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, v = qkv(rng, rows=60, keys=90, q_dtype=dtype, layout=layout)
    gates = rng.random((1, 4, 60, 3)).astype(np.float32)
    if dtype == BF16:  # each of the three parts is rounded to storage
        out = np.asarray(native_sparse_attention(q, k, v, gates, **SMALL), np.float64)
        expected = reference.native_sparse_attention(q, k, v, gates, **SMALL)
        assert np.abs(out - expected).max() <= 4 * 2.0**-8 * np.abs(np.asarray(v, np.float64)).max()
    else:
        check(q, k, v, gates)


def test_given_compressed_blocks(rng, isa):
    q, k, v = qkv(rng, rows=50, keys=90)
    count = (90 - 8) // 4 + 1
    compressed = normal(rng, (1, 2, count, 16)), normal(rng, (1, 2, count, 16))
    check(q, k, v, rng.random((1, 4, 50, 3)).astype(np.float32), compressed=compressed)


def test_any_number_of_threads(rng, threads):
    q, k, v = qkv(rng, rows=200, keys=200)
    check(q, k, v, rng.random((1, 4, 200, 3)).astype(np.float32))


@pytest.mark.parametrize(("rows", "keys"), [(1, 3), (5, 8), (20, 5), (3, 0), (0, 3)])
def test_few_rows(rng, isa, rows, keys):
    q, k, v = qkv(rng, rows=rows, keys=keys)
    out = native_sparse_attention(q, k, v, np.ones((1, 4, rows, 3), np.float32), **SMALL)
    assert out.shape == q.shape and np.isfinite(out).all()


# Identities


def test_the_window_alone(rng, isa):
    q, k, v = qkv(rng, rows=80, keys=100)
    expected = la.attention(q, k, v, causal=True, window=(19, 0))
    out = native_sparse_attention(q, k, v, only(2, q), **SMALL)
    tolerances.same_storage(q, k, v).check(out, expected)


def test_all_selected_blocks_are_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=80, keys=100)
    out = native_sparse_attention(q, k, v, only(1, q), **SMALL | {"n_select": 7})
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


def test_compressed_blocks_of_one_key_are_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=80, keys=100)
    out = native_sparse_attention(q, k, v, only(0, q), **SMALL | {"block": 1, "stride": 1})
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


def test_it_is_linear_in_the_gates(rng, isa):
    q, k, v = qkv(rng, rows=60, keys=60)
    gates = rng.standard_normal((1, 4, 60, 3)).astype(np.float32)
    whole = native_sparse_attention(q, k, v, gates, **SMALL)
    parts = [gates[..., i : i + 1] * native_sparse_attention(q, k, v, only(i, q), **SMALL) for i in range(3)]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-5, atol=1e-5)


def test_steps_are_the_prefill(rng, isa):
    q, k, v = qkv(rng, rows=70, keys=70)
    gates = rng.random((1, 4, 70, 3)).astype(np.float32)
    whole, tolerance = native_sparse_attention(q, k, v, gates, **SMALL), tolerances.same_storage(q, k, v)
    for n in (1, 7, 8, 33, 70):
        part = (x[:, :, n - 1 : n] for x in (q, gates))
        step = native_sparse_attention(next(part), k[:, :, :n], v[:, :, :n], next(part), **SMALL)
        np.testing.assert_allclose(step, whole[:, :, n - 1 : n], atol=3 * tolerance.atol, rtol=3 * tolerance.rtol)


def test_statistics(rng):
    q, k, v = qkv(rng, rows=64, keys=64)
    _, stats = native_sparse_attention(q, k, v, only(1, q), **SMALL, return_stats=True)
    assert 0 < stats.density < 1 and stats.scored == 4 * sum(max(0, (p + 1 - 8) // 4 + 1) for p in range(64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": 6}, ValueError, r"block: got 6, expected a multiple of the stride, 4"),
        ({"select_block": 10}, ValueError, r"select_block: got 10, expected a multiple of the stride, 4"),
        ({"stride": 0}, ValueError, r"stride: got 0"),
        ({"n_local": 0}, ValueError, r"n_local: got 0"),
        ({"window": 0}, ValueError, r"window: got 0"),
        ({"gates": np.ones((1, 4, 20, 2), np.float32)}, ValueError, r"gates: got shape \(1, 4, 20, 2\)"),
        ({"gates": np.ones((1, 4, 20, 3), int)}, TypeError, r"gates: got dtype int64"),
        ({"compressed": (np.zeros((1, 2, 3, 16), np.float32),) * 2}, ValueError, r"compressed: got keys of shape"),
        ({"compressed": 3}, TypeError, r"compressed: got int"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=20, keys=20)
    given = {"q": q, "k": k, "v": v, "gates": np.ones((1, 4, 20, 3), np.float32), **SMALL} | change
    with pytest.raises(error, match=message):
        native_sparse_attention(**given)
