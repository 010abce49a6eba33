"""The halves of neighbourhood attention, and their agreement with the fused function."""

import warnings

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from random_arrays import DTYPES, F32, normal
from running import on_threads

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


def check_gradients(found, expected, arrays, function, terms, **options):
    """Beside the formula; sizes are the formula's of magnitudes."""
    sizes = function(*(np.abs(np.asarray(x, np.float64)) for x in arrays), **options)
    for ours, theirs, size in zip(found, expected, sizes, strict=True):
        tolerances.check_linear(ours, theirs, size, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_gradients_of_scores(rng, isa, dtype, shape, rule):
    q, k, _ = grid_qkv(rng, shape, dtype=dtype)
    # Of places that do not count, too: they must not count.
    d_scores = normal(rng, la.sparse.na_qk(q, k, **rule).shape)
    for scale in (None, 0.7):
        options = {"scale": scale, "return_d_bias": True, **rule}
        found = la.sparse.na_qk_backward(d_scores, q, k, **options)
        assert [x.dtype for x in found] == [q.dtype, k.dtype, np.float32]
        expected = reference.na_qk_backward(d_scores, q, k, **options)
        check_gradients(found, expected, (d_scores, q, k), reference.na_qk_backward, 2 * np.prod(shape), **options)
    without = la.sparse.na_qk_backward(d_scores, q, k, scale=0.7, **rule)
    assert len(without) == 2 and all(np.array_equal(x, y) for x, y in zip(without, found, strict=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_gradients_of_values(rng, isa, dtype, shape, rule):
    _, _, v = grid_qkv(rng, shape, dtype=dtype)
    places = int(np.prod(reference.spread(rule["window"], len(shape))))
    weights, d_out = normal(rng, (2, 4, *shape, places), dtype), normal(rng, (2, 4, *shape, 12), dtype)
    found = la.sparse.na_av_backward(d_out, weights, v, **rule)
    assert [x.dtype for x in found] == [dtype, dtype]
    expected = reference.na_av_backward(d_out, weights, v, **rule)
    check_gradients(found, expected, (d_out, weights, v), reference.na_av_backward, 2 * np.prod(shape), **rule)


@pytest.mark.parametrize("heads", [(8, 1), (3, 3), (200, 1)])
def test_gradients_over_many_tiles(rng, isa, heads):
    """Each half's gradient is the other way of the half: both give one number with it."""
    rule = {"window": (5, 7), "dilation": (2, 1)}
    q, k, _ = grid_qkv(rng, (17, 18), heads=heads[0], kv_heads=heads[1], dim=20)
    scores = la.sparse.na_qk(q, k, scale=1.0, **rule)
    d_scores = normal(rng, scores.shape)
    dq, dk, d_bias = la.sparse.na_qk_backward(d_scores, q, k, scale=1.0, return_d_bias=True, **rule)
    sums = [np.sum(a.astype(float) * b) for a, b in ((d_scores, scores), (q, dq), (k, dk))]
    size = float(np.sum(np.abs(d_scores.astype(float) * scores)))
    assert max(sums) - min(sums) < 1e-6 * size
    np.testing.assert_allclose(d_bias.sum(), d_scores.sum(dtype=float), atol=1e-4 * size**0.5)
    out = la.sparse.na_av(d_scores, k, **rule)
    d_out = normal(rng, out.shape)
    d_weights, dv = la.sparse.na_av_backward(d_out, d_scores, k, **rule)
    sums = [np.sum(a.astype(float) * b) for a, b in ((d_out, out), (d_scores, d_weights), (k, dv))]
    assert max(sums) - min(sums) < 1e-6 * float(np.sum(np.abs(d_out.astype(float) * out)))


def both_gradients(d_scores, q, k, d_out, v):
    of_scores = la.sparse.na_qk_backward(d_scores, q, k, window=3)
    return *of_scores, *la.sparse.na_av_backward(d_out, d_scores, v, window=3)


@pytest.mark.parametrize(
    "lay",
    [
        lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -2)), -2, 1),
        lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
        lambda x: np.pad(x, ((0, 0), (0, 0), (1, 2), (2, 1), (0, 0)))[:, :, 1:-2, 2:-1],
    ],
    ids=["heads last", "stepped", "cropped"],
)
def test_gradients_of_layouts(rng, lay):
    q, k, v = grid_qkv(rng, (6, 7), dim=12)
    arrays = normal(rng, (2, 4, 6, 7, 9)), q, k, normal(rng, (2, 4, 6, 7, 12)), v
    found, expected = both_gradients(*map(lay, arrays)), both_gradients(*arrays)
    assert all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))


def test_gradients_on_any_number_of_threads(rng):
    q, k, v = grid_qkv(rng, (20, 21))
    d_scores, d_out = normal(rng, (2, 4, 20, 21, 25)), normal(rng, (2, 4, 20, 21, 12))
    found = on_threads(
        lambda: (
            *la.sparse.na_qk_backward(d_scores, q, k, window=5, return_d_bias=True),
            *la.sparse.na_av_backward(d_out, d_scores, v, window=5),
        )
    )
    for other in found[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_gradients_of_nan_reach_only_what_they_are_of(rng, isa):
    q, k, v = grid_qkv(rng, (12,), heads=2)
    d_scores, d_out = normal(rng, (2, 2, 12, 3)), normal(rng, (2, 2, 12, 12))
    near = [abs(x - 6) <= 1 for x in range(12)]
    bad = q.copy()
    bad[:, :, 6] = np.nan
    dq, dk = la.sparse.na_qk_backward(d_scores, bad, k, window=3)
    assert np.isfinite(dq).all() and np.isnan(dk).any(axis=(0, 1, 3)).tolist() == near
    bad = d_scores.copy()
    bad[:, :, 6, 0] = np.inf
    dv = la.sparse.na_av_backward(d_out, bad, v, window=3)[1]
    assert (~np.isfinite(dv)).any(axis=(0, 1, 3)).tolist() == [x == 5 for x in range(12)]
    bad = d_out.copy()
    bad[:, :, 6] = np.inf
    d_weights, dv = la.sparse.na_av_backward(bad, d_scores, v, window=3)
    assert (~np.isfinite(dv)).any(axis=(0, 1, 3)).tolist() == near
    assert (~np.isfinite(d_weights)).any(axis=(0, 1, 3)).tolist() == [x == 6 for x in range(12)]


def test_gradients_too_large_for_their_dtype_are_infinite(rng):
    """Without a warning: whoever scales a loss looks for them."""
    q, k, v = grid_qkv(rng, (6, 7), dtype=np.float16)
    large = np.full((2, 4, 6, 7, 9), 1e300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = la.sparse.na_qk_backward(large, q, k, window=3)
        weights, d_out = np.ones(large.shape, np.float16), np.full((2, 4, 6, 7, 12), 6e4, np.float16)
        found += la.sparse.na_av_backward(d_out, weights, v, window=3)
    assert all((~np.isfinite(x)).any() for x in found)


def test_gradients_of_nothing():
    nothing = np.zeros((0, 2, 6, 6, 4), np.float32)
    found = la.sparse.na_qk_backward(np.zeros((0, 2, 6, 6, 9)), nothing, nothing, window=3, return_d_bias=True)
    assert [x.shape for x in found] == [nothing.shape] * 2 + [(2, 5, 5)] and not found[2].any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"window": 7}, ValueError, "window: got 7"),
        ({"d_scores": np.zeros((1, 2, 6, 6, 8))}, ValueError, "d_scores: got shape"),
        ({"d_scores": np.zeros((1, 2, 6, 6, 9), int)}, TypeError, "d_scores: got dtype int64"),
        ({"return_d_bias": 1}, TypeError, "return_d_bias: got 1"),
        ({"k": np.zeros((1, 2, 6, 5, 4), np.float32)}, ValueError, "k: got a grid"),
    ],
)
def test_bad_input_of_gradients_of_scores(change, error, words, monkeypatch):
    name = "longattn.sparse.neighborhood_attention_unfused_backward.na_av"
    monkeypatch.setattr(name, lambda *_, **__: pytest.fail("gradients were computed"))
    x = np.zeros((1, 2, 6, 6, 4), np.float32)
    given = {"d_scores": np.zeros((1, 2, 6, 6, 9)), "q": x, "k": x, "window": 3}
    with pytest.raises(error, match=words):
        la.sparse.na_qk_backward(**(given | change))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"window": 7}, ValueError, "window: got 7"),
        ({"d_out": np.zeros((1, 2, 6, 6, 5), np.float32)}, ValueError, "d_out: got shape"),
        ({"d_out": np.zeros((1, 2, 6, 6, 4))}, TypeError, "d_out: got dtype float64"),
        ({"weights": np.zeros((1, 2, 6, 6, 8), np.float32)}, ValueError, "weights: got 8 places"),
    ],
)
def test_bad_input_of_gradients_of_values(change, error, words):
    x = np.zeros((1, 2, 6, 6, 4), np.float32)
    given = {"d_out": x, "weights": np.zeros((1, 2, 6, 6, 9), np.float32), "v": x, "window": 3}
    with pytest.raises(error, match=words):
        la.sparse.na_av_backward(**(given | change))


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
