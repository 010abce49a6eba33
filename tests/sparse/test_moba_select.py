"""`moba_select` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import Moba, moba_select
from random_arrays import DTYPES, LAYOUTS, qkv


def attend(q, k, v, *, causal=True, **options):
    return la.sparse_attention(q, k, v, Moba(**options), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "rows", "keys"), [(1, 1, 64, 64), (6, 2, 50, 130), (4, 4, 100, 7)])
def test_blocks(rng, isa, causal, heads, kv_heads, rows, keys):
    q, k, _ = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys)
    for options in ({"top_k": 1}, {"top_k": 3}):
        ours = moba_select(q, k, block=16, causal=causal, **options)
        np.testing.assert_array_equal(ours.blocks(), reference.moba_select(q, k, block=16, causal=causal, **options))
    assert ours.scored == 2 * heads * rows * -(-keys // 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, _ = qkv(rng, rows=70, keys=90, dim=20, q_dtype=dtype, layout=layout)
    ours = moba_select(q, k, block=16, top_k=2).blocks()
    np.testing.assert_array_equal(ours, reference.moba_select(q, k, block=16, top_k=2))


def test_any_number_of_threads(rng, threads):
    q, k, _ = qkv(rng, rows=300, keys=300)
    np.testing.assert_array_equal(moba_select(q, k, block=32).blocks(), reference.moba_select(q, k, block=32))


# Identities


@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_give_dense_attention(rng, isa, causal):
    q, k, v = qkv(rng, rows=100, keys=130)
    out = attend(q, k, v, block=16, top_k=9, causal=causal)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=causal))


def test_one_block_per_query_is_attention_inside_blocks(rng, isa):
    q, k, v = qkv(rng, rows=90, keys=90)
    numbers = np.arange(90) // 16
    expected = la.attention(q, k, v, mask=numbers[:, None] == numbers, causal=True)
    tolerances.same_storage(q, k, v).check(attend(q, k, v, block=16, top_k=1), expected)


def test_blocks_of_one_key_are_the_best_keys(rng, isa):
    q, k, _ = qkv(rng, heads=2, kv_heads=2, rows=40, keys=40)
    kept = moba_select(q, k, block=1, top_k=6).blocks()
    scores = q.astype(float) @ k.astype(float).swapaxes(-1, -2)
    scores = np.where(np.eye(40, dtype=bool), np.inf, np.where(np.tri(40, dtype=bool), scores, -np.inf))
    for i in range(40):
        best = np.argsort(-scores[..., i, : i + 1], axis=-1)[..., :6]
        assert np.take_along_axis(kept[:, :, i], best, axis=-1).all() and (kept[:, :, i].sum(-1) == min(i + 1, 6)).all()


def test_steps_choose_as_the_prefill(rng, isa):
    q, k, _ = qkv(rng, rows=64, keys=64)
    whole = moba_select(q, k, block=8, top_k=3).blocks()
    for n in (8, 32, 64):
        step = moba_select(q[:, :, n - 1 : n], k[:, :, :n], block=8, top_k=3).blocks()
        np.testing.assert_array_equal(step[:, :, 0], whole[:, :, n - 1, : n // 8])


def test_the_own_block_is_always_taken(rng, isa):
    q, k, _ = qkv(rng, rows=64, keys=64)
    k[:] = -10 * q.mean(axis=(1, 2), keepdims=True)
    kept = moba_select(q, k, block=8, top_k=2).blocks()
    assert kept[:, :, np.arange(64), np.arange(64) // 8].all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": 0}, ValueError, r"block: got 0"),
        ({"top_k": 0}, ValueError, r"top_k: got 0"),
        ({"top_k": "a"}, TypeError, r"top_k: got 'a'"),
        ({"causal": 1}, TypeError, r"causal: got 1"),
        ({"k": np.zeros((1, 2, 9, 15), np.float32)}, ValueError, r"k: got head_dim 15"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, _ = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        moba_select(**({"q": q, "k": k} | change))
