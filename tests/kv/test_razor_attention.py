"""RazorAttention: retrieval heads keep everything, the others sinks, a window and a compensation row."""

import numpy as np
import pytest

import longattn as la
import tolerances
from eviction import cache_of, check, decode, dense, sequence
from longattn.kv.evict import RazorAttention, razor_compress
from longattn.reference import kv as reference
from random_arrays import DTYPES, LAYOUTS, lay, normal


@pytest.mark.parametrize("prompt", [0, 9, 35])
@pytest.mark.parametrize("heads", [[True, False], [False, False], [False, True]])
def test_steps_are_those_of_a_simulation(rng, *, heads, prompt):
    q, k, v = sequence(rng, heads=6)
    options = {"sinks": 2, "window": 5, "ratio": 4}
    policy, model = RazorAttention(np.array(heads), **options), reference.RazorAttention(heads, **options)
    cache = cache_of(policy, k, v)
    out, kept = decode(cache, q, k, v, prompt=prompt)
    expected, expected_kept = reference.evicting.decode(model, q, k, v, prompt=prompt, residual="mean")
    assert kept == expected_kept
    tolerances.attention(q, k, v, offset=np.log(60)).check(out, expected)
    for head, full in enumerate(heads):
        assert len(kept[-1][head]) == (60 if full else 2 + 15)
        assert cache.store.folded[head] == 60 - len(kept[-1][head])


def test_retrieval_heads_only_are_dense(rng):
    q, k, v = sequence(rng)
    out, _ = decode(cache_of(RazorAttention(np.ones(2, bool), window=3), k, v), q, k, v, prompt=20)
    tolerances.attention(q, k, v).check(out, dense(q, k, v))


def test_one_dropped_row_is_itself(rng, isa):
    q, k, v = sequence(rng, length=12)
    out, kept = decode(cache_of(RazorAttention(np.zeros(2, bool), sinks=1, window=10, ratio=1000), k, v), q, k, v)
    assert kept[-2] == [[0, *range(2, 11)]] * 2
    tolerances.attention(q, k, v, offset=1).check(out, dense(q, k, v))


def test_equal_keys_may_go(rng, isa):
    """Where all dropped keys are equal the mean of their values is all that matters."""
    q, k, v = sequence(rng)
    k[:, 4:50] = k[:, 4:5]
    policy = RazorAttention(np.zeros(2, bool), sinks=4, window=10, ratio=1000)
    out, kept = decode(cache_of(policy, k, v), q, k, v)
    assert len(kept[-1][0]) == 13
    tolerances.attention(q, k, v, offset=np.log(60)).check(out, dense(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_that_grow_are_means(rng, dtype):
    q, k, v = sequence(rng, dtype=dtype)
    cache = cache_of(RazorAttention(np.zeros(2, bool), sinks=2, window=5), k, v)
    _, kept = decode(cache, q, k, v, prompt=17)
    for head in range(2):
        gone = sorted(set(range(60)) - set(kept[-1][head]))
        key, value, count = cache.store.mean_row(head)
        assert count == len(gone)
        np.testing.assert_allclose(key, k[head, gone].astype(float).mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(value, v[head, gone].astype(float).mean(axis=0), rtol=1e-12, atol=1e-12)


def test_without_compensation_rows_are_just_gone(rng):
    q, k, v = sequence(rng)
    options = {"sinks": 2, "window": 5, "compensation": False}
    heads = np.array([False, True])
    cache, _, _ = check(RazorAttention(heads, **options), reference.RazorAttention(heads, **options), q, k, v)
    assert cache.store.folded == [0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compressed_rows_with_a_bias(rng, layout):
    q, k, v = sequence(rng, heads=3, kv_heads=3, length=40)
    k, v = lay(k, layout), lay(v, layout)
    keep = rng.random((3, 40)) < [[0.3], [0.6], [2.0]]
    keys, values, bias = razor_compress(k, v, keep)
    out = la.attention(q[:, -1:], keys, values, bias=bias)
    expected = reference.compensated(q[:, -1], k, v, keep)
    tolerances.attention(q, k, v, offset=np.log(40)).check(out[:, 0], expected)
    assert keys.shape == (3, 41, 16) and np.isneginf(bias[2, 0, -1]), "the last head drops nothing"


def test_one_choice_for_all_heads(rng):
    k, v = normal(rng, (2, 10, 8)), normal(rng, (2, 10, 8))
    keep = np.arange(10) % 3 == 0
    for one, other in zip(razor_compress(k, v, keep), razor_compress(k, v, np.stack([keep] * 2)), strict=True):
        np.testing.assert_array_equal(one, other)
    keys, _, bias = razor_compress(k, v, ~np.ones(10, bool))
    np.testing.assert_allclose(keys[:, 0], k.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(bias[:, 0, 0], np.log(10))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: RazorAttention(np.ones(2)), TypeError, "retrieval_heads: got dtype float64, expected bool"),
        (lambda x: RazorAttention(np.ones((2, 2), bool)), ValueError, r"retrieval_heads: got shape \(2, 2\)"),
        (lambda x: RazorAttention(np.ones(2, bool), window=0), ValueError, "window: got 0"),
        (lambda x: RazorAttention(np.ones(2, bool), ratio=0), ValueError, "ratio: got 0"),
        (
            lambda x: cache_of(RazorAttention(np.ones(3, bool)), x, x).append(x, x),
            ValueError,
            "retrieval_heads: got 3 heads, expected 2",
        ),
        (lambda x: razor_compress(x, x[:, :3], np.ones(4, bool)), ValueError, r"v: got shape \(2, 3, 8\)"),
        (lambda x: razor_compress(x, x, np.ones(4)), TypeError, "keep: got dtype float64"),
        (lambda x: razor_compress(x, x, np.ones(5, bool)), ValueError, r"keep: got shape \(5,\)"),
    ],
)
def test_bad_input(rng, call, error, message):
    with pytest.raises(error, match=message):
        call(normal(rng, (2, 4, 8)))
