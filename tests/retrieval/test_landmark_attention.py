"""`landmark_attention` and its step form."""

from itertools import pairwise

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from longattn.retrieval import LandmarkCache, landmark_attention
from random_arrays import DTYPES, F32, LAYOUTS, normal, qkv
from running import on_threads

SELECT = pytest.mark.parametrize("select", ["row", "chunk"])


def check(q, k, v, **options):
    out, lse = landmark_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.landmark_attention(q, k, v, return_lse=True, **options)
    tolerances.two_levels(q, k, v, scale=options.get("scale")).check(out, expected, lse, expected_lse)


@SELECT
@pytest.mark.parametrize("top_k", [None, 0, 1, 3])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 37])
def test_reference(rng, select, top_k, length):
    check(
        *qkv(rng, batch=2, heads=4, kv_heads=2, rows=length, keys=length, value_dim=12),
        block_len=4, top_k=top_k, select=select,
    )  # fmt: skip


@SELECT
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("keys", [34, 35, 36])
def test_the_last_queries(rng, select, rows, keys):
    check(*qkv(rng, heads=6, kv_heads=2, rows=rows, keys=keys), block_len=4, top_k=2, select=select)


def test_many_blocks(rng):
    """More than are held at a time."""
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=5, keys=3 * 45, dim=8)
    check(q, k, v, block_len=2)
    check(q, k, v, block_len=2, top_k=40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    check(*qkv(rng, rows=30, keys=30, dim=32, q_dtype=dtype), block_len=4, top_k=2, scale=0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(*qkv(rng, rows=30, keys=30, layout=layout), block_len=4, top_k=2)


def test_rank_3_out_stats_and_torch(rng):
    q, k, v = (x[0] for x in qkv(rng, rows=30, keys=33))
    out = np.full(q.shape, np.nan, np.float32)
    options = {"block_len": 4, "top_k": 2}
    given, lse, stats = landmark_attention(q, k, v, out=out, return_lse=True, return_stats=True, **options)
    assert given is out and lse.shape == (4, 30)
    np.testing.assert_array_equal(stats.blocks_total[1], np.arange(3, 33) // 5)
    np.testing.assert_array_equal(stats.blocks_scored, stats.blocks_total)
    np.testing.assert_array_equal(stats.blocks_attended, np.minimum(stats.blocks_total, 2))
    torch = pytest.importorskip("torch")
    tensor = landmark_attention(*(torch.from_numpy(x) for x in (q, k, v)), **options)
    np.testing.assert_array_equal(tensor.numpy(), out)


def test_any_number_of_threads(rng):
    q, k, v = qkv(rng, rows=60, keys=60)
    results = on_threads(lambda: landmark_attention(q, k, v, block_len=7, top_k=2))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


# Identities


@SELECT
def test_every_block_is_full_attention_over_blocks(rng, isa, select):
    q, k, v = qkv(rng, rows=33, keys=33)
    whole, lse = landmark_attention(q, k, v, block_len=4, return_lse=True)
    out, some = landmark_attention(q, k, v, block_len=4, top_k=6, select=select, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, whole, some, lse)


def test_landmarks_at_their_blocks_log_sum_are_causal_attention(rng, isa):
    """One query, whose landmark logits can be made so."""
    q, k, v = qkv(rng, heads=2, kv_heads=2, rows=1, keys=24)
    factor, ordinary = 16**-0.5, np.arange(24) % 5 != 4
    for h in range(2):
        query = q[0, h, 0].astype(np.float64)
        logits = factor * (k[0, h].astype(np.float64) @ query)
        for mark in range(4, 24, 5):
            target = np.log(np.exp(logits[mark - 4 : mark]).sum())
            k[0, h, mark] = query * target / (factor * (query @ query))
    out, lse = landmark_attention(q, k, v, block_len=4, return_lse=True)
    expected, expected_lse = la.attention(q, k[:, :, ordinary], v[:, :, ordinary], return_lse=True)
    tolerances.two_levels(q, k, v).check(out, np.asarray(expected, np.float64), lse, expected_lse)


@pytest.mark.parametrize("length", [1, 8])
def test_without_a_finished_block_it_is_causal_attention(rng, isa, length):
    q, k, v = qkv(rng, rows=length, keys=length)
    out, lse = landmark_attention(q, k, v, block_len=8, return_lse=True)
    expected, expected_lse = la.attention(q, k, v, causal=True, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


@SELECT
@pytest.mark.parametrize("top_k", [None, 2])
def test_weights_sum_to_1(rng, isa, select, top_k):
    """Of equal values come the same; landmarks' values are not read."""
    q, k, _ = qkv(rng, rows=33, keys=33)
    v = np.ones((1, 2, 33, 3), np.float32)
    v[:, :, 4::5] = np.nan
    out = landmark_attention(q, k, v, block_len=4, top_k=top_k, select=select)
    tolerances.two_levels(q, k, np.ones_like(v)).check(out, np.ones(out.shape))
    weights, _ = reference.landmark_weights(q[0], k[0], block_len=4, top_k=top_k, select=select)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [(1,) * 44, (5, 7, 1, 20, 11)], ids=["1", "some"])
def test_steps_are_the_prefill(rng, dtype, chunks):
    q, k, v = (x[0] for x in qkv(rng, rows=44, keys=44, q_dtype=dtype, value_dim=12))
    cache, steps = LandmarkCache(2, 16, 12, dtype=dtype, block_len=4, top_k=2), []
    for a, b in pairwise(np.cumsum((0, *chunks))):
        cache.append(k[:, a:b], v[:, a:b])
        steps.append(cache.attend(q[:, a:b]))
    assert len(cache) == 44 and cache.landmark_nbytes == 2 * 16 * 16 * 4
    whole = landmark_attention(q, k, v, block_len=4, top_k=2)
    one, storage = tolerances.two_levels(q, k, v), tolerances.same_storage(q, k, v)
    allowed = tolerances.Tolerance(atol=2 * one.atol + storage.atol, rtol=2 * one.rtol, lse_atol=0)
    allowed.check(np.concatenate(steps, axis=1), np.asarray(whole, np.float64))


# Slots


@SELECT
@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("keys", [8, 27, 41])
def test_slots(rng, select, top_k, rows, keys):
    """Keys come unrotated; retrieved blocks lie in slots before the own page."""
    q, k, v = (x[0] for x in qkv(rng, rows=rows, keys=keys))
    cache = LandmarkCache(2, 16, dtype=F32, block_len=4, top_k=top_k, select=select, rope_base=100.0)
    cache.append(k[:, :7], v[:, :7])
    cache.append(k[:, 7:], v[:, 7:])
    out, lse, stats = cache.attend(q, return_lse=True, return_stats=True)
    options = {"block_len": 4, "top_k": top_k, "select": select, "rope_base": 100.0}
    weights, expected_lse = reference.landmark_weights(q, k, **options)
    tolerances.two_levels(q, k, v).check(out, weights @ np.repeat(v, 2, axis=0), lse, expected_lse)
    most = keys if top_k is None else top_k
    np.testing.assert_array_equal(stats.blocks_attended[0], np.minimum(np.arange(keys - rows, keys) // 5, most))


def test_with_every_block_slots_are_true_places(rng):
    """What rotary positions before the call give."""
    q, k, v = (x[0] for x in qkv(rng, rows=23, keys=23))
    places = [
        np.array([[reference.rotated(row, j, 100.0) for j, row in enumerate(head)] for head in x]) for x in (q, k)
    ]
    cache = LandmarkCache(2, 16, dtype=F32, block_len=4, top_k=4, rope_base=100.0)
    cache.append(k, v)
    expected = reference.landmark_attention(*places, v, block_len=4)
    tolerances.two_levels(q, k, v).check(cache.attend(q), expected)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_len": 0}, ValueError, r"block_len: got 0"),
        ({"top_k": -1}, ValueError, r"top_k: got -1"),
        ({"top_k": 2.0}, TypeError, r"top_k: got 2.0"),
        ({"select": "head"}, ValueError, r"select: got 'head', expected 'row' or 'chunk'"),
        ({"scale": float("nan")}, ValueError, r"scale: got nan"),
        ({"q": np.zeros((1, 4, 31, 16), F32)}, ValueError, r"q: got 31 queries, expected at most the 30 keys"),
        ({"q": np.zeros((1, 4, 30, 16))}, TypeError, r"q: got dtype float64"),
        ({"return_stats": 1}, TypeError, r"return_stats: got 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=30, keys=30)
    with pytest.raises(error, match=message):
        landmark_attention(**({"q": q, "k": k, "v": v, "block_len": 4} | change))


def test_bad_cache_arguments(rng):
    for change, message in (
        ({"rope_base": 0.0}, r"rope_base: got 0.0"),
        ({"head_dim": 15, "rope_base": 10.0}, r"rope_base: got 10.0 for head_dim 15"),
        ({"kv_heads": 0}, r"kv_heads: got 0"),
        ({"select": "x"}, r"select: got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            LandmarkCache(**({"kv_heads": 2, "head_dim": 16} | change))
    cache = LandmarkCache(2, 16, dtype=F32, block_len=4)
    with pytest.raises(ValueError, match=r"k: got shape"):
        cache.append(normal(rng, (1, 2, 3, 16)), normal(rng, (1, 2, 3, 16)))
    cache.append(normal(rng, (2, 3, 16)), normal(rng, (2, 3, 16)))
    with pytest.raises(ValueError, match=r"q: got 4 queries, expected at most the 3 rows"):
        cache.attend(normal(rng, (4, 4, 16)))
    with pytest.raises(ValueError, match=r"q: got 3 heads, expected a positive multiple of the 2"):
        cache.attend(normal(rng, (3, 1, 16)))
