"""`dynamic_block_topk` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import DynamicBlocks, dynamic_block_topk
from random_arrays import DTYPES, LAYOUTS, normal, qkv


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "rows", "keys"), [(1, 1, 64, 64), (6, 2, 90, 130), (4, 4, 100, 100)])
def test_blocks(rng, isa, causal, heads, kv_heads, rows, keys):
    q, k, _ = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys)
    for options in ({"top_k": 1}, {"top_k": 3}, {"top_k": 2, "own": False}):
        ours = DynamicBlocks(block=16, **options)(q, k, causal=causal).blocks()
        np.testing.assert_array_equal(ours, reference.dynamic_blocks(q, k, block=16, causal=causal, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, v = qkv(rng, rows=70, keys=90, dim=20, q_dtype=dtype, layout=layout)
    options = {"top_k": 2, "block": 16, "scale": 0.3}
    out, lse = dynamic_block_topk(q, k, v, **options, return_lse=True)
    expected, expected_lse = reference.dynamic_block_topk(q, k, v, **options, return_lse=True)
    tolerances.attention(q, k, v, scale=0.3).check(out, expected, lse, expected_lse)


def test_any_number_of_threads(rng, threads):
    q, k, v = qkv(rng, rows=300, keys=300)
    out = dynamic_block_topk(q, k, v, top_k=2, block=16, causal=True)
    tolerances.attention(q, k, v).check(out, reference.dynamic_block_topk(q, k, v, top_k=2, block=16, causal=True))


@pytest.mark.parametrize(("rows", "keys"), [(1, 100), (100, 5), (3, 0), (0, 3)])
def test_few_rows(rng, isa, rows, keys):
    q, k, v = qkv(rng, rows=rows, keys=keys)
    out = dynamic_block_topk(q, k, v, top_k=2, block=16, causal=True)
    assert out.shape == q.shape and np.isfinite(out).all()


# Identities


@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_give_dense_attention(rng, isa, causal):
    q, k, v = qkv(rng, rows=100, keys=130)
    out = dynamic_block_topk(q, k, v, top_k=9, block=16, causal=causal)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=causal))


def test_blocks_of_one_row_are_the_best_keys(rng, isa):
    q, k, _ = qkv(rng, heads=2, kv_heads=2, rows=30, keys=40)
    kept = DynamicBlocks(top_k=5, block=1, own=False)(q, k).blocks()
    scores = q.astype(float) @ k.astype(float).swapaxes(-1, -2)
    bar = np.sort(scores, axis=-1)[..., -5, None]
    np.testing.assert_array_equal(kept, scores >= bar)


def test_equal_rows_give_the_largest_weights(rng, isa):
    q, k = (np.repeat(normal(rng, (1, 2, 12, 16), spread=2.0), 8, axis=2) for _ in range(2))
    kept = DynamicBlocks(top_k=3, block=8, own=False)(q, k).blocks()
    mass = la.dense.attention_weights(q, k, rows=np.arange(0, 96, 8)).reshape(1, 2, 12, 12, 8).sum(axis=-1)
    assert (np.where(kept, mass, 1).min(axis=-1) >= np.where(kept, 0, mass).max(axis=-1)).all()


def test_it_is_dense_attention_with_its_mask(rng, isa):
    q, k, v = qkv(rng, rows=90, keys=130)
    mask = DynamicBlocks(top_k=2, block=16)(q, k)
    out, stats = dynamic_block_topk(q, k, v, top_k=2, block=16, return_stats=True)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, mask=mask.to_dense_mask()))
    assert stats.density == pytest.approx(mask.density())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_k": 0}, ValueError, r"top_k: got 0"),
        ({"block": 2.5}, TypeError, r"block: got 2.5"),
        ({"own": 1}, TypeError, r"own: got 1"),
        ({"q": np.zeros((1, 4, 9, 16))}, TypeError, r"q: got dtype float64"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        dynamic_block_topk(**({"q": q, "k": k, "v": v} | change))
