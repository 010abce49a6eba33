"""`attention(..., qk_int8=True)`: within what rounding to 8 bits allows, exact where nothing is rounded."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F32, qkv
from running import on_threads
from tolerances.exact import MULTIPLY_BYTES


def logit_error(q, k, scale):
    """The most by which rounding changes a row's logits, `[B, Hq, Lq]`: the bound of the docstring."""
    q, k = np.asarray(q, np.float64) * scale, np.asarray(k, np.float64)
    k = np.repeat(k - k.mean(axis=-2, keepdims=True), q.shape[1] // k.shape[1], axis=1)
    f, g = np.abs(q).max(-1) / 127, np.abs(k).max(-1) / 127
    sums = np.abs(q).sum(-1)[..., None] * g[..., None, :] + f[..., None] * np.abs(k).sum(-1)[..., None, :]
    return (sums + q.shape[-1] / 2 * f[..., None] * g[..., None, :]).max(-1) / 2


def check(q, k, v, out, lse, **options):
    """Output and lse against float64, with the error that rounding may make on top of what float32 may."""
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    scale = options.get("scale") or q.shape[-1] ** -0.5
    error = logit_error(q, k, scale)
    exact = tolerances.attention(q, k, v, scale=options.get("scale"))
    reach = np.abs(np.asarray(v, np.float64)).max()
    # Every weight changes by a factor within exp(+-2 error).
    allowed = np.expm1(2 * error)[..., None] * reach + exact.atol + exact.rtol * np.abs(expected)
    assert (np.abs(np.asarray(out, np.float64) - expected) <= allowed).all()
    assert (np.abs(lse - expected_lse) <= error + exact.lse_atol + exact.lse_rtol * np.abs(expected_lse)).all()
    return expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (128, 40), (5, 7), (33, 100)])
def test_is_within_what_rounding_allows(isa, rng, dtype, dim, value_dim):
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=70, keys=300, dim=dim, value_dim=value_dim, q_dtype=dtype)
    out, lse = la.attention(q, k, v, causal=True, qk_int8=True, return_lse=True)
    check(q, k, v, out, lse, causal=True)


def test_typical_error_is_small(isa, rng):
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=200, keys=1000, dim=64)
    exact = reference.attention(q, k, v)
    error = np.asarray(la.attention(q, k, v, qk_int8=True)) - exact
    assert np.sqrt((error**2).mean() / (exact**2).mean()) < 0.02
    if isa in MULTIPLY_BYTES:
        assert np.abs(error).max() > 1e-4  # it was rounded


def test_what_keys_have_in_common_costs_nothing(isa, rng):
    """A large constant in every key, which takes all of 8 bits without smoothing, moves no weight."""
    q, k, v = qkv(rng, heads=2, kv_heads=2, rows=60, keys=400, dim=64)
    shifted = k + 50 * rng.standard_normal((1, 2, 1, 64)).astype(np.float32)
    out, lse = la.attention(q, shifted, v, qk_int8=True, return_lse=True)
    check(q, shifted, v, out, lse)
    exact = reference.attention(q, k, v)
    assert np.sqrt(((np.asarray(out) - exact) ** 2).mean() / (exact**2).mean()) < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"window": (40, 0), "causal": True},
        {"softcap": 20.0},
        {"scale": 0.05},
        {"sinks": np.array([0.5, -1, 2, 0], np.float32)},
        {"alibi_slopes": np.array([0.1, 0.2, 0.05, 0.3], np.float32)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_scores(isa, rng, options):
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=50, keys=280, dim=32)
    out, lse = la.attention(q, k, v, qk_int8=True, return_lse=True, **options)
    check(q, k, v, out, lse, **options)


def test_few_rows_are_not_rounded(isa, rng):
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=4, keys=300, dim=64, q_dtype=BF16)
    exact = la.attention(q, k, v, return_lse=True)
    for a, b in zip(la.attention(q, k, v, qk_int8=True, return_lse=True), exact, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sets_without_byte_products_do_not_round(isa, rng):
    q, k, v = qkv(rng, rows=50, keys=300, dim=64)
    same = np.array_equal(la.attention(q, k, v, qk_int8=True), la.attention(q, k, v))
    assert same == (isa not in MULTIPLY_BYTES)


def test_keys_of_a_coded_store(isa, rng):
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=40, keys=200, dim=64)
    store = la.KVStore(2, 64, dtype="int8", capacity=200)
    store.append(k, v)
    out, lse = la.attention(q[0], store.keys, store.values, qk_int8=True, return_lse=True)
    decoded = np.asarray(store.keys)[None], np.asarray(store.values)[None]
    check(q, *decoded, out[None], lse[None])


def test_hidden_numbers_do_not_leak_and_visible_ones_propagate(isa, rng):
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=40, keys=100, dim=16)
    k[..., 90:, :], v[..., 90:, :] = np.nan, np.inf
    mask = np.arange(100) < 90
    out, lse = la.attention(q, k, v, mask=mask[None, None, None], qk_int8=True, return_lse=True)
    clean = la.attention(q, k[..., :90, :], v[..., :90, :], qk_int8=True)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    check(q, k[..., :90, :], v[..., :90, :], out, lse)
    np.testing.assert_allclose(out, clean, atol=0.1)
    assert np.isnan(la.attention(q, k, v, qk_int8=True)).all()


def test_constant_keys_zero_queries_and_no_keys(isa):
    q, k = np.zeros((1, 1, 20, 8), np.float32), np.full((1, 1, 30, 8), 3, np.float32)
    v = np.arange(240, dtype=np.float32).reshape(1, 1, 30, 8)
    out, lse = la.attention(q, k, v, qk_int8=True, return_lse=True)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=2, keepdims=True), out.shape), rtol=1e-6)
    np.testing.assert_allclose(lse, np.log(30), rtol=1e-6)
    out, lse = la.attention(q, k[:, :, :0], v[:, :, :0], qk_int8=True, return_lse=True)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_same_bits_on_any_number_of_threads(isa, rng):
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=130, keys=700, dim=64, q_dtype=F32)
    results = on_threads(lambda: la.attention(q, k, v, causal=True, qk_int8=True))
    assert all(np.array_equal(result, results[0]) for result in results)


def test_bad_flag(rng):
    q, k, v = qkv(rng)
    with pytest.raises(TypeError, match="qk_int8: got 1, expected True or False"):
        la.attention(q, k, v, qk_int8=1)
