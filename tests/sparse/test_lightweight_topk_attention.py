"""`lightweight_topk_attention` and its selection against float64 references, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import lightweight_topk_attention, lightweight_topk_select, next_rho, shared_layer
from random_arrays import DTYPES, normal, qkv


def made(rng, *, batch=2, rows=50, keys=70, wide=24, narrow=8):
    x_q, x_k = normal(rng, (batch, rows, wide)), normal(rng, (batch, keys, wide))
    wq, wk = (normal(rng, (wide, narrow), spread=wide**-0.5) for _ in range(2))
    return x_q, x_k, wq, wk


def check(x_q, x_k, wq, wk, *, rho, min_keys=10, causal=False):
    """As many keys as asked for, and none left out with a clearly larger logit."""
    lists = lightweight_topk_select(x_q, x_k, wq, wk, rho=rho, min_keys=min_keys, causal=causal)
    picked = lists.to_dense_mask()[:, 0]
    logits = reference.lightweight_topk_logits(x_q, x_k, wq, wk)
    rows, keys = logits.shape[1:]
    seen = np.tri(rows, keys, keys - rows, dtype=bool) if causal else np.ones((rows, keys), bool)
    visible = seen.sum(axis=-1)
    wanted = np.minimum(np.maximum(np.ceil(rho * visible), min_keys), visible)
    np.testing.assert_array_equal(picked.sum(axis=-1), np.broadcast_to(wanted, picked.shape[:2]))
    assert not (picked & ~seen).any()
    lowest = np.where(picked, logits, np.inf).min(axis=-1)
    highest = np.where(seen & ~picked, logits, -np.inf).max(axis=-1)
    assert (lowest >= highest - 1e-5 * np.abs(logits).max()).all()
    return lists


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(50, 70), (70, 70), (1, 300), (300, 5), (260, 700)])
@pytest.mark.parametrize("rho", [0.05, 0.3, 1.0])
def test_selection(rng, isa, causal, rows, keys, rho):
    arrays = made(rng, rows=rows, keys=keys)
    check(*arrays, rho=rho, causal=causal)
    check(*arrays, rho=rho, min_keys=0, causal=causal)


def test_ties_go_to_the_first(rng, isa):
    x = np.ones((1, 20, 4), np.float32)
    lists = lightweight_topk_select(x, x, np.eye(4), np.eye(4), rho=0.25, min_keys=0)
    assert lists.indices.tolist() == [0, 1, 2, 3, 4] * 20
    causal = lightweight_topk_select(x, x, np.eye(4), np.eye(4), rho=0.25, min_keys=0, causal=True)
    assert causal.indices[-5:].tolist() == [0, 1, 2, 3, 4] and lists.scored == 400


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(rng, isa, threads, dtype):
    q, k, v = qkv(rng, batch=2, heads=6, kv_heads=2, rows=50, keys=70, q_dtype=dtype)
    lists = check(*made(rng), rho=0.2, causal=True)
    out, lse = lightweight_topk_attention(q, k, v, lists=lists, causal=True, return_lse=True)
    expected, expected_lse = reference.lightweight_topk_attention(q, k, v, lists=lists, causal=True, return_lse=True)
    tolerances.attention(q, k, v).check(out, expected, lse, expected_lse)


def test_statistics(rng):
    q, k, v = qkv(rng, batch=2, rows=50, keys=70)
    lists = lightweight_topk_select(*made(rng), rho=0.1, min_keys=0)
    _, stats = lightweight_topk_attention(q, k, v, lists=lists, return_stats=True)
    assert stats.density == pytest.approx(0.1) and stats.scored == 2 * 50 * 70


# Identities


@pytest.mark.parametrize("causal", [False, True])
def test_all_keys_are_dense_attention(rng, isa, causal):
    q, k, v = qkv(rng, batch=2, rows=50, keys=70)
    lists = lightweight_topk_select(*made(rng), rho=1.0, causal=causal)
    out = lightweight_topk_attention(q, k, v, lists=lists, causal=causal)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=causal))


def test_a_heads_own_queries_and_keys_pick_its_largest_logits(rng, isa):
    q, k, _ = qkv(rng, heads=1, kv_heads=1, rows=30, keys=90)
    lists = lightweight_topk_select(q[:, 0], k[:, 0], np.eye(16), np.eye(16), rho=0.1, min_keys=0)
    logits = q[0, 0].astype(np.float64) @ k[0, 0].T
    best = np.sort(np.argsort(-logits, axis=-1)[:, :9], axis=-1)
    np.testing.assert_array_equal(lists.indices.reshape(30, 9), best)


def test_shared_lists_are_those_of_equal_weights(rng):
    arrays = made(rng)
    layers = [lightweight_topk_select(*arrays, rho=0.2) for _ in range(2)]
    np.testing.assert_array_equal(layers[0].indices, layers[1].indices)
    assert [shared_layer(layer, 3) for layer in range(7)] == [0, 0, 0, 3, 3, 3, 6]
    assert [shared_layer(layer, 1) for layer in range(3)] == [0, 1, 2]


def test_steps_are_the_prefill(rng, isa):
    q, k, v = qkv(rng, batch=2, rows=70, keys=70)
    x, _, wq, wk = made(rng, rows=70)
    lists = lightweight_topk_select(x, x, wq, wk, rho=0.2, causal=True)
    whole = lightweight_topk_attention(q, k, v, lists=lists, causal=True)
    for n in (1, 11, 64, 70):
        step = lightweight_topk_select(x[:, n - 1 : n], x[:, :n], wq, wk, rho=0.2, causal=True)
        out = lightweight_topk_attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], lists=step, causal=True)
        tolerances.same_storage(q, k, v).check(out, whole[:, :, n - 1 : n])


def test_the_rule_of_training():
    assert next_rho(1.0, 0.99) == pytest.approx(0.999) and next_rho(0.5, 0.9) == pytest.approx(0.501)
    assert next_rho(0.01, 1.0) == 0.01 and next_rho(1.0, 0.1) == 1.0 and next_rho(0.5, 0.95) == pytest.approx(0.501)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rho": 0.0}, ValueError, r"rho: got 0.0, expected above 0 and at most 1"),
        ({"rho": 1.5}, ValueError, r"rho: got 1.5"),
        ({"min_keys": -1}, ValueError, r"min_keys: got -1"),
        ({"causal": 1}, TypeError, r"causal: got 1"),
        ({"x_q": np.zeros((2, 3, 4, 5), np.float32)}, ValueError, r"x_q: got shape \(2, 3, 4, 5\)"),
        ({"wk": np.zeros((23, 8), np.float32)}, ValueError, r"wk: got shape \(23, 8\), expected \[24, d\]"),
        (
            {"wk": np.zeros((24, 7), np.float32)},
            ValueError,
            r"x_k: got batch 2 and projected width 7, expected",
        ),
        ({"wq": np.zeros((24, 8), int)}, TypeError, r"wq: got dtype int64"),
    ],
)
def test_bad_selections(rng, change, error, message):
    arrays = dict(zip(("x_q", "x_k", "wq", "wk"), made(rng), strict=True))
    with pytest.raises(error, match=message):
        lightweight_topk_select(**(arrays | change))


def test_bad_lists(rng):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(TypeError, match=r"lists: got NoneType, expected RowLists"):
        lightweight_topk_attention(q, k, v, lists=None)
    with pytest.raises(ValueError, match=r"layer: got -1"):
        shared_layer(-1, 2)
