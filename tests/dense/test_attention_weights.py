"""Weights of chosen rows against their float64 reference, and what they are to `attention`."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longattn as la
import tolerances
from longattn import _core
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F32, LAYOUTS, normal, qkv
from running import on_threads, running_on
from score_options import options_for


def check(q, k, rows, *, offset=0.0, **options):
    """Compare with the reference."""
    actual = la.dense.attention_weights(q, k, rows, **options)
    assert actual.dtype == np.float32 and actual.shape == (*q.shape[:-2], len(rows), k.shape[-2])
    expected = reference.attention_weights(q, k, rows, **options)
    tolerances.weights(q, k, scale=options.get("scale"), offset=offset).check(actual, expected)
    return actual


@pytest.mark.parametrize("keys", [1, 15, 17, 127, 128, 129, 255, 257, 600])
@pytest.mark.parametrize("rows", [[0], [3, -1], [8, 0, 0, 5, 2, -9]])
def test_ragged(rng, isa, keys, rows):
    q, k, _ = qkv(rng, rows=9, keys=keys, dim=20)
    check(q, k, rows)
    check(q, k, rows, causal=True)


def test_many_rows_and_pieces(rng, isa, threads):
    q, k, _ = qkv(rng, heads=2, kv_heads=1, rows=250, keys=5000, dim=16)
    actual = la.dense.attention_weights(q, k, range(250), causal=True)
    logits = 0.25 * np.float64(q) @ np.float64(k).swapaxes(-1, -2)
    expected = np.where(np.arange(5000) <= np.arange(4750, 5000)[:, None], np.exp(logits), 0.0)
    tolerances.weights(q, k).check(actual, expected / expected.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, _ = qkv(rng, batch=2, rows=40, keys=70, dim=24, q_dtype=dtype, layout=layout)
    check(q, k, [0, 39], causal=True)
    check(q, k, range(0, 40, 3), causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (8, 8), (16, 1)])
def test_groups(rng, isa, heads, kv_heads):
    q, k, _ = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=30, keys=45, dim=32)
    check(q, k, [-1], causal=True)
    check(q, k, range(30), causal=True)


def test_rank_3(rng):
    q, k, _ = qkv(rng, rows=6, keys=40)
    whole = la.dense.attention_weights(q, k, [1, 5], causal=True)
    np.testing.assert_array_equal(la.dense.attention_weights(q[0], k[0], [1, 5], causal=True), whole[0])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("rows", [[2], range(30)])
def test_keys_of_codes(rng, isa, dtype, rows):
    store = la.KVStore(2, 40, dtype=dtype, capacity=300)
    store.append(normal(rng, (2, 300, 40)), normal(rng, (2, 300, 40)))
    q = normal(rng, (4, 30, 40))
    weights = la.dense.attention_weights(q, store.keys, rows, causal=True)
    decoded = np.asarray(store.keys)
    tolerances.weights(q, decoded).check(weights, reference.attention_weights(q, decoded, rows, causal=True))


def test_rows_sum_to_one(rng, isa):
    q, k, _ = qkv(rng, rows=30, keys=700, dim=32, spread=8.0)
    sums = la.dense.attention_weights(q, k, range(30), causal=True).sum(axis=-1, dtype=np.float64)
    tolerances.weights(q, k).check_sums(sums, np.ones_like(sums), np.ones_like(sums))


def test_weights_times_values_are_attention(rng, isa):
    q, k, v = qkv(rng, rows=30, keys=300, dim=32)
    options = {"causal": True, "window": (100, -1), "sinks": normal(rng, (4,)), "softcap": 4.0}
    out = la.attention(q, k, v, **options)
    weights = la.dense.attention_weights(q, k, range(30), **options)
    product = weights @ np.repeat(v, 2, axis=1).astype(np.float64)
    tolerances.same_storage(q, k, v, offset=5.0).check(out, product)


def test_a_sink_takes_its_share(rng, isa):
    q, k, _ = qkv(rng, rows=5, keys=50)
    sinks = np.array([-3.0, 0.0, 3.0, 200.0], np.float32)
    weights = check(q, k, range(5), sinks=sinks, offset=200.0)
    lse = la.attention(q, k, k, sinks=sinks, return_lse=True)[1]
    shares = np.exp(np.float64(sinks[:, None]) - lse)
    np.testing.assert_allclose(weights.sum(axis=-1, dtype=np.float64) + shares, 1.0, atol=2e-5)


def test_a_given_lse_makes_shares_of_a_larger_softmax(rng, isa):
    q, k, v = qkv(rng, rows=12, keys=300)
    _, lse = la.attention(q, k, v, return_lse=True)
    halves = [
        la.dense.attention_weights(q, k[:, :, part], range(12), lse=lse) for part in (slice(120), slice(120, 300))
    ]
    together = np.concatenate(halves, axis=-1)
    tolerances.weights(q, k).check(together, reference.attention_weights(q, k, range(12)))
    check(q, k, [3], lse=lse[:, :, 3:4] + np.float32(1.5), offset=1.5)


def test_rows_that_see_nothing_weigh_nothing(rng, isa):
    q, k, _ = qkv(rng, rows=30, keys=10)
    weights = check(q, k, range(30), causal=True)
    assert (weights[:, :, :20] == 0).all() and (weights[:, :, 20] > 0).any()
    dark = la.dense.attention_weights(q, k, [25], lse=np.full((1, 4, 1), -np.inf, np.float32))
    assert (dark == 0).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [[2], range(20)])
def test_hidden_numbers_do_not_leak(rng, isa, poison, rows):
    q, k, _ = qkv(rng, rows=20, keys=300)
    seen = rng.random(300) > 0.3
    clean = la.dense.attention_weights(q, k, rows, mask=seen)
    k[:, :, ~seen] = poison
    np.testing.assert_array_equal(la.dense.attention_weights(q, k, rows, mask=seen), clean)


def test_visible_nan_shows(rng, isa):
    q, k, _ = qkv(rng, rows=20, keys=300)
    k[0, 0, 290, 3] = np.nan
    weights = la.dense.attention_weights(q, k, [0, -1], causal=True)
    assert np.isnan(weights[:, :2, 1]).all()
    assert np.isfinite(weights[:, :2, 0]).all() and np.isfinite(weights[:, 2:]).all()
    assert (weights[:, :2, 0, 281:] == 0).all()


@settings(max_examples=25 * len(_core.available_isas()))
@given(data=st.data(), isa=st.sampled_from(_core.available_isas()))
def test_any_options(data, isa):
    q, k, options, offset = data.draw(options_for())
    rows = data.draw(st.lists(st.integers(-q.shape[2], q.shape[2] - 1), max_size=20)) if q.shape[2] else []
    with running_on(isa):
        check(q, k, rows, offset=offset, **options)


def test_nothing_to_do():
    q, k = np.ones((2, 4, 3, 8), np.float32), np.ones((2, 2, 0, 8), np.float32)
    assert la.dense.attention_weights(q, k, [0]).shape == (2, 4, 1, 0)
    assert la.dense.attention_weights(q, q, []).shape == (2, 4, 0, 3)
    assert la.dense.attention_weights(q, q, np.array([], int)).shape == (2, 4, 0, 3)


Q, K = np.ones((2, 4, 3, 8), np.float32), np.ones((2, 2, 5, 8), np.float32)
BAD = [
    ({"q": Q[0]}, ValueError, "k: got shape (2, 2, 5, 8), expected rank 3 as q"),
    ({"q": Q[0, 0]}, ValueError, "q: got shape (3, 8), expected rank 3 or 4"),
    ({"q": Q.astype(np.float64)}, TypeError, "q: got dtype float64"),
    ({"q": Q[:, :3]}, ValueError, "q: got 3 heads"),
    ({"k": K[:1]}, ValueError, "k: got batch 1, expected 2 as in q"),
    ({"k": K[..., :7]}, ValueError, "k: got head_dim 7, expected 8 as in q"),
    ({"k": K[..., :0]}, ValueError, "k: got head_dim 0"),
    ({"rows": [3]}, ValueError, "rows: got 3, expected numbers from -3 to 2"),
    ({"rows": [-4]}, ValueError, "rows: got -4"),
    ({"rows": [[0]]}, ValueError, "rows: got shape (1, 1), expected [n]"),
    ({"rows": [0.5]}, TypeError, "rows: got dtype float64, expected integers"),
    ({"rows": 1}, TypeError, "rows: got int, expected"),
    ({"lse": np.zeros((2, 4, 3), np.float32)}, ValueError, "lse: got shape (2, 4, 3), expected (2, 4, 1)"),
    ({"lse": np.zeros((2, 4, 1), int)}, TypeError, "lse: got dtype int64"),
    ({"causal": 1}, TypeError, "causal: got 1"),
    ({"window": (1, -2)}, ValueError, "window: got (1, -2)"),
    ({"scale": np.nan}, ValueError, "scale: got nan"),
    ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
    ({"bias": np.zeros((3, 4))}, ValueError, "bias: got shape (3, 4)"),
    ({"mask": np.zeros((3, 5))}, TypeError, "mask: got dtype float64"),
    ({"sinks": np.zeros(3)}, ValueError, "sinks: got shape (3,)"),
    ({"alibi_slopes": np.zeros(3)}, ValueError, "alibi_slopes: got shape (3,)"),
    ({"out": Q}, TypeError, "out: got an option that does not exist here, expected some of causal, window"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_refuses(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        la.dense.attention_weights(**({"q": Q, "k": K, "rows": [0]} | change))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_same_bits_on_any_number_of_threads(rng, dtype):
    q, k, _ = qkv(rng, heads=4, kv_heads=2, rows=150, keys=9000, dim=32, q_dtype=dtype)
    results = on_threads(lambda: la.dense.attention_weights(q, k, [0, 70, -1], causal=True))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
