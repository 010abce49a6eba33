"""`core_context_attention`: cores of distant groups and near tokens in one softmax."""

from itertools import pairwise

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.pool import CoreContextCache, core_context_attention, core_context_pool
from longattn.reference import pool as reference
from random_arrays import DTYPES, F32, LAYOUTS, normal, qkv
from running import on_threads


def check(q, k, v, **options):
    out, lse = core_context_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.core_context_attention(q, k, v, return_lse=True, **options)
    named = {name: options[name] for name in ("scale", "count_bias") if name in options}
    tolerances.core_context(q, k, v, **named).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize(("group", "window"), [(4, 8), (1, 5), (3, 0), (16, 16), (5, 40), (1, 0)])
@pytest.mark.parametrize("length", [61, 80])
def test_reference(rng, isa, group, window, length):
    check(*qkv(rng, batch=2, heads=4, kv_heads=2, rows=length, keys=length, value_dim=12), group=group, window=window)


@pytest.mark.parametrize("length", [1, 3, 4, 12, 13, 16])
def test_short_sequences(rng, isa, length):
    check(*qkv(rng, rows=length, keys=length), group=4, window=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    check(*qkv(rng, heads=6, kv_heads=2, rows=50, keys=50, dim=32, q_dtype=dtype), group=4, window=8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(*qkv(rng, rows=50, keys=50, dim=32, layout=layout), group=4, window=8)


def test_options(rng, isa):
    q, k, v = qkv(rng, rows=50, keys=50)
    check(q, k, v, group=4, window=8, scale=0.7)
    check(q, k, v, group=4, window=8, count_bias=float(np.log(4)))


@pytest.mark.parametrize("rows", [1, 3, 4, 17, 40])
def test_given_cores_and_the_last_queries(rng, isa, rows):
    """Any number of last rows, aligned to groups or not, gives the rows of the whole."""
    q, k, v = qkv(rng, batch=2, rows=57, keys=57)
    cores = core_context_pool(q, k, v, group=4)
    whole, whole_lse = core_context_attention(q, k, v, group=4, window=8, return_lse=True)
    options = {"group": 4, "window": 8, "cores": cores}
    out, lse = core_context_attention(q[:, :, -rows:], k, v, return_lse=True, **options)
    tolerance = tolerances.core_context(q, k, v)
    tolerance.check(out, whole[:, :, -rows:], lse, whole_lse[:, :, -rows:])
    check(q[:, :, -rows:], k, v, **options)


def test_pool(rng, isa):
    q, k, v = qkv(rng, batch=2, heads=6, kv_heads=2, rows=37, keys=37, value_dim=20)
    pooled = core_context_pool(q, k, v, group=5)
    tolerance = tolerances.core_context(q, k, np.concatenate([k, v], axis=-1))
    for ours, exact in zip(pooled, reference.core_context_pool(q, k, v, group=5), strict=True):
        assert ours.dtype == np.float32
        tolerance.check(ours, exact)


def test_rank_3_out_and_torch(rng):
    q, k, v = (x[0] for x in qkv(rng, rows=30, keys=30))
    out = np.full(q.shape, np.nan, np.float32)
    given, lse = core_context_attention(q, k, v, group=4, window=8, out=out, return_lse=True)
    assert given is out and lse.shape == (4, 30)
    np.testing.assert_array_equal(out, core_context_attention(q[None], k[None], v[None], group=4, window=8)[0])
    torch = pytest.importorskip("torch")
    tensor = core_context_attention(*(torch.from_numpy(x) for x in (q, k, v)), group=4, window=8)
    np.testing.assert_array_equal(tensor.numpy(), out)


def test_any_number_of_threads(rng):
    q, k, v = qkv(rng, rows=200, keys=200)
    results = on_threads(lambda: core_context_attention(q, k, v, group=4, window=8))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


# Identities


def test_sequences_within_the_window_are_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=64, keys=64)
    expected = la.attention(q, k, v, causal=True)
    tolerances.same_storage(q, k, v).check(core_context_attention(q, k, v, group=8, window=64), expected)


@pytest.mark.parametrize("window", [0, 1, 7, 60])
def test_groups_of_one_are_causal_attention(rng, isa, window):
    q, k, v = qkv(rng, rows=50, keys=50)
    expected, expected_lse = la.attention(q, k, v, causal=True, return_lse=True)
    out, lse = core_context_attention(q, k, v, group=1, window=window, return_lse=True)
    tolerances.core_context(q, k, v).check(out, expected, lse, expected_lse)


def test_equal_tokens_in_each_group_are_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=48, keys=12)
    k, v = (np.repeat(x, 4, axis=2) for x in (k, v))
    out, lse = core_context_attention(q, k, v, group=4, window=8, count_bias=float(np.log(4)), return_lse=True)
    expected, expected_lse = la.attention(q, k, v, causal=True, return_lse=True)
    tolerances.core_context(q, k, v, count_bias=np.log(4)).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [(1,) * 90, (7, 1, 30, 2, 50), (90,), (16, 16, 58)], ids=["1", "some", "all", "few"])
def test_steps_are_the_prefill(rng, dtype, chunks):
    q, k, v = (x[0] for x in qkv(rng, heads=4, kv_heads=2, rows=90, keys=90, value_dim=12, q_dtype=dtype))
    cache = CoreContextCache(2, 16, 12, dtype=dtype, group=4, window=8)
    bounds = np.cumsum((0, *chunks))
    steps = [cache.append(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in pairwise(bounds)]
    assert len(cache) == 90
    whole = core_context_attention(q, k, v, group=4, window=8)
    one, storage = tolerances.core_context(q, k, v), tolerances.same_storage(q, k, v)
    allowed = tolerances.Tolerance(atol=2 * one.atol + storage.atol, rtol=2 * one.rtol, lse_atol=0)
    allowed.check(np.concatenate(steps, axis=1), np.asarray(whole, np.float64))


def test_the_cache_keeps_little(rng):
    """Raw rows are bounded by window and group, whatever the length."""
    cache = CoreContextCache(2, 16, dtype=F32, group=4, window=8)
    for _ in range(200):
        cache.append(normal(rng, (4, 1, 16)), normal(rng, (2, 1, 16)), normal(rng, (2, 1, 16)))
    assert cache._k.shape[1] == 2 * (8 + 4) and len(cache._cores) == 50
    assert cache.nbytes == cache._k.nbytes + cache._v.nbytes + cache._cores.nbytes


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 10}, ValueError, r"window: got 10, expected a multiple of group, 4"),
        ({"group": 0}, ValueError, r"group: got 0, expected at least 1"),
        ({"group": 4.0}, TypeError, r"group: got 4.0, expected an integer"),
        ({"window": -4}, ValueError, r"window: got -4"),
        ({"count_bias": float("nan")}, ValueError, r"count_bias: got nan"),
        ({"return_lse": 1}, TypeError, r"return_lse: got 1"),
        ({"q": np.zeros((1, 4, 20, 16), F32)}, ValueError, r"q: got 20 queries for 30 keys, expected all of them"),
        ({"q": np.zeros((1, 4, 40, 16), F32)}, ValueError, r"q: got 40 queries, expected at most the 30 keys"),
        ({"q": np.zeros((1, 4, 30, 16))}, TypeError, r"q: got dtype float64"),
        ({"cores": 3}, TypeError, r"cores: got int, expected a pair"),
        ({"cores": (np.zeros((1, 3, 5, 16), F32),) * 2}, ValueError, r"cores\[0\]: got shape \(1, 3, 5, 16\)"),
        ({"cores": (np.zeros((1, 2, 3, 16), F32),) * 2}, ValueError, r"cores\[0\]: got shape .* with N at least 5"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=30, keys=30)
    with pytest.raises(error, match=message):
        core_context_attention(**({"q": q, "k": k, "v": v, "group": 4, "window": 8} | change))


def test_bad_cache_arguments(rng):
    cache = CoreContextCache(2, 16, group=4, window=8, capacity=10)
    q, k = np.zeros((4, 3, 16), F32), np.zeros((2, 3, 16), F32)
    with pytest.raises(ValueError, match=r"k: got shape \(4, 3, 16\), expected \[2, T, 16\]"):
        cache.append(q, q, q)
    with pytest.raises(ValueError, match=r"q: got 2 queries, expected 3"):
        cache.append(q[:, :2], k, k)
    with pytest.raises(ValueError, match=r"v: got value_dim 8, expected 16"):
        cache.append(q, k, k[..., :8])
    long = np.zeros((2, 11, 16), F32)
    with pytest.raises(ValueError, match=r"k: got 11 tokens after 0, expected at most 10"):
        cache.append(np.zeros((4, 11, 16), F32), long, long)
    assert len(cache) == 0
    with pytest.raises(ValueError, match=r"window: got 9"):
        CoreContextCache(2, 16, group=4, window=9)
