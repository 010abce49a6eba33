"""The halves of neighbourhood attention, and their agreement with the fused function."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from random_arrays import DTYPES, F32, normal

unfused = la.sparse.neighborhood_attention_unfused
fused = la.sparse.generalized_neighborhood_attention

CASES = [
    ((11,), {"window": 4}),
    ((9,), {"window": 3, "dilation": 2, "causal": True}),
    ((6, 7), {"window": (3, 4)}),
    ((8, 9), {"window": (2, 3), "dilation": (3, 2), "causal": (True, False)}),
    ((3, 4, 5), {"window": (2, 3, 5), "causal": (False, True, False)}),
]


def grid_qkv(rng, shape, *, heads=4, kv_heads=2, dim=16, value_dim=12, dtype=F32):
    q = normal(rng, (2, heads, *shape, dim), dtype)
    return q, normal(rng, (2, kv_heads, *shape, dim), dtype), normal(rng, (2, kv_heads, *shape, value_dim), dtype)


def tokens(x):
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def tolerance(q, k, v, offset=0.0):
    return tolerances.attention(tokens(q), tokens(k), tokens(v), offset=offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_scores(rng, isa, dtype, shape, rule):
    q, k, v = grid_qkv(rng, shape, dtype=dtype)
    scores = la.sparse.na_qk(q, k, **rule)
    assert scores.dtype == np.float32
    # A logit errs as an lse does.
    one = tolerance(q, k, v)
    np.testing.assert_allclose(scores, reference.na_qk(q, k, **rule), rtol=one.lse_rtol, atol=one.lse_atol)


@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_scores_with_bias(rng, shape, rule):
    q, k, v = grid_qkv(rng, shape)
    table = rng.standard_normal((4, *(2 * w - 1 for w in reference.spread(rule["window"], len(shape)))))
    expected = reference.na_qk(q, k, bias=table, scale=0.3, **rule)
    one = tolerance(q, k, v, offset=4.0)
    scores = la.sparse.na_qk(q, k, bias=table, scale=0.3, **rule)
    np.testing.assert_allclose(scores, expected, rtol=one.lse_rtol, atol=one.lse_atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_values(rng, isa, dtype, shape, rule):
    _, _, v = grid_qkv(rng, shape, dtype=dtype)
    places = int(np.prod(reference.spread(rule["window"], len(shape))))
    weights = normal(rng, (2, 4, *shape, places), dtype)
    out = la.sparse.na_av(weights, v, **rule)
    assert out.dtype == dtype and out.shape == (2, 4, *shape, 12)
    size = reference.na_av(np.abs(weights.astype(np.float64)), np.abs(v.astype(np.float64)), **rule)
    tolerances.check_linear(out, reference.na_av(weights, v, **rule), size, places)


@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_reference_and_fused(rng, isa, shape, rule):
    q, k, v = grid_qkv(rng, shape)
    table = rng.standard_normal((4, *(2 * w - 1 for w in reference.spread(rule["window"], len(shape)))))
    out, weights = unfused(q, k, v, bias=table, return_weights=True, **rule)
    expected = reference.neighborhood_attention_unfused(q, k, v, bias=table, **rule)
    tolerance(q, k, v, offset=4.0).check(out, expected)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    both = tolerances.same_storage(tokens(q), tokens(k), tokens(v), offset=4.0)
    both.check(out, fused(q, k, v, bias=table, **rule))


@pytest.mark.parametrize(("shape", "window"), [((9,), 3), ((6, 7), 3), ((4, 5, 6), (3, 1, 5))])
def test_weight_at_the_own_place(rng, isa, shape, window):
    _, _, v = grid_qkv(rng, shape)
    places = int(np.prod(reference.spread(window, len(shape))))
    weights = np.zeros((2, 4, *shape, places), np.float32)
    rules = list(zip(shape, reference.spread(window, len(shape)), strict=True))
    for token in np.ndindex(*shape):
        own = [reference.window_tokens(x, n, w, 1, 1, False).index(x) for x, (n, w) in zip(token, rules, strict=True)]
        weights[(..., *token, np.ravel_multi_index(own, [w for _, w in rules]))] = 1
    np.testing.assert_array_equal(la.sparse.na_av(weights, v, window=window), np.repeat(v, 2, axis=1))


def test_window_of_the_axis_is_dense(rng, isa):
    q, k, v = grid_qkv(rng, (5, 6))
    expected = la.attention(tokens(q), tokens(k), tokens(v)).reshape(2, 4, 5, 6, 12)
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(unfused(q, k, v, window=(5, 6)), expected)


def test_window_of_one_gives_values(rng, isa):
    q, k, v = grid_qkv(rng, (5, 6))
    for function in (unfused, fused):
        np.testing.assert_array_equal(function(q, k, v, window=1), np.repeat(v, 2, axis=1))


def test_equal_values_come_out(rng, isa):
    q, k, v = grid_qkv(rng, (5, 6))
    v = np.full_like(v, 0.75)
    for function in (unfused, fused):
        np.testing.assert_allclose(function(q, k, v, window=3), 0.75, rtol=1e-5)


def test_nan_reaches_only_those_that_see_it(rng, isa):
    _, _, v = grid_qkv(rng, (12,), heads=2)
    v = v.copy()
    v[:, :, 6] = np.nan
    out = la.sparse.na_av(np.ones((2, 2, 12, 3), np.float32), v, window=3)
    bad = np.isnan(out).any(axis=(0, 1, 3))
    assert bad.tolist() == [abs(x - 6) <= 1 for x in range(12)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 7}, "window: got 7"),
        ({"weights": np.zeros((1, 2, 6, 6, 8), np.float32)}, "weights: got 8 places"),
        ({"weights": np.zeros((1, 2, 6, 5, 9), np.float32)}, "v: got a grid"),
        ({"v": np.zeros((1, 3, 6, 6, 4), np.float32)}, "weights: got 2 heads"),
    ],
)
def test_bad_input(change, words):
    given = {"weights": np.zeros((1, 2, 6, 6, 9), np.float32), "v": np.zeros((1, 2, 6, 6, 4), np.float32), "window": 3}
    with pytest.raises(ValueError, match=words):
        la.sparse.na_av(**(given | change))
