"""Masks, lists and selectors that are made of others."""

import ml_dtypes
import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.sparse import Antidiagonal, DynamicBlocks, Intersection, PerHead, Union, VerticalSlash
from random_arrays import qkv
from random_lists import random_lists, random_mask


@pytest.mark.parametrize("make", [random_mask, random_lists])
def test_per_head(rng, make):
    one, other, shared = make(rng, batch=2, heads=3), make(rng, heads=3), make(rng)
    made = type(one).per_head([one, other, shared], [1, 0, 2])
    dense = [np.broadcast_to(x.to_dense_mask(), (2, 3, 100, 130)) for x in (one, other, shared)]
    expected = np.stack([dense[1][:, 0], dense[0][:, 1], dense[2][:, 2]], axis=1)
    np.testing.assert_array_equal(made.to_dense_mask(), expected)
    assert made.density() == pytest.approx(expected.mean())


@pytest.mark.parametrize(
    ("tables", "which", "error", "message"),
    [
        ([], [0], TypeError, r"tables: got \[\], expected at least one BlockMask"),
        ([3], [0], TypeError, r"tables: got \[3\], expected at least one BlockMask"),
        (["mask"], [1], ValueError, r"which: got 1, expected"),
        (["mask"], [], ValueError, r"which: got none"),
        (["mask"], [0, 0, 0], ValueError, r"tables: got shape \(1, 2, 7\)"),
        (["mask", "other"], [0, 1], ValueError, r"tables: got block_k 4, expected 8"),
    ],
)
def test_bad_tables(rng, tables, which, error, message):
    known = {"mask": random_mask(rng, heads=2), "other": random_mask(rng, heads=2, block_k=4)}
    with pytest.raises(error, match=message):
        la.BlockMask.per_head([known.get(x, x) for x in tables], which)


def test_lists_with_a_bias_make_no_table(rng):
    with pytest.raises(ValueError, match=r"tables: got lists with a bias"):
        la.RowLists.per_head([random_lists(rng, bias=True)], [0, 0])


def test_plot_of_lists(rng):
    pytest.importorskip("matplotlib").use("Agg")
    lists = random_lists(rng, heads=2)
    ax = lists.plot(head=1, cells=64)
    assert ax.get_xlim() == (0, 130) and ax.get_ylim() == (100, 0)


def test_selectors_compose(rng):
    q, k, v = qkv(rng, rows=96, keys=96)
    one, other = DynamicBlocks(top_k=2, block=16), Antidiagonal(block=16, stride=4, threshold=0.5)
    masks = [x(q, k, causal=True) for x in (one, other)]
    for made, blocks in (
        (Union([one, other]), masks[0].blocks() | masks[1].blocks()),
        (Intersection([one, other]), masks[0].blocks() & masks[1].blocks()),
        (
            PerHead([one, other], [0, 1, 1, 0]),
            np.stack([masks[i].blocks()[:, h] for h, i in enumerate((0, 1, 1, 0))], 1),
        ),
    ):
        np.testing.assert_array_equal(made(q, k, causal=True).blocks(), blocks)
        out = la.sparse_attention(q, k, v, made, causal=True)
        dense = np.repeat(np.repeat(blocks, 16, axis=2), 16, axis=3)
        tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, mask=dense, causal=True))


def test_selectors_of_different_kinds_do_not(rng):
    q, k, _ = qkv(rng, rows=96, keys=96)
    with pytest.raises(TypeError, match=r"other: got RowLists, expected a BlockMask"):
        Union([DynamicBlocks(top_k=2, block=16), VerticalSlash()])(q, k, causal=True)
    with pytest.raises(TypeError, match=r"selectors: got \(3,\)"):
        Union((3,))
    with pytest.raises(ValueError, match=r"which: got 1"):
        PerHead([DynamicBlocks()], [1])


# Heads that are packed as a whole, which many blocks of queries share


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("block_q", "block_k", "heads"), [(64, 64, 8), (32, 32, 2), (64, 96, 1), (200, 320, 4)])
def test_packed_heads(rng, isa, threads, dtype, block_q, block_k, heads):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    q, k, v = qkv(rng, batch=2, heads=8, kv_heads=2, rows=410, keys=701, dim=24, value_dim=40, q_dtype=dtype)
    mask = random_mask(rng, batch=2, heads=heads, lengths=(410, 701), block_q=block_q, block_k=block_k, density=0.7)
    for options in ({}, {"causal": True}, {"window": (100, 30), "softcap": 3.0}):
        dense = np.repeat(mask.to_dense_mask(), 8 // heads, axis=1)
        expected, expected_lse = la.attention(q, k, v, mask=dense, return_lse=True, **options)
        out, lse = la.block_sparse_attention(q, k, v, mask, return_lse=True, **options)
        tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


def test_packed_codes(rng, isa):
    q, k, v = (x[0] for x in qkv(rng, rows=300, keys=400, dim=32))
    store = la.KVStore(2, 32, dtype="int8", capacity=512)
    store.append(k, v)
    mask = random_mask(rng, lengths=(300, 400), block_q=32, block_k=64, density=0.6)
    decoded = [np.asarray(x) for x in (store.keys, store.values)]
    expected = la.attention(q, *decoded, mask=mask.to_dense_mask()[0], causal=True)
    out = la.block_sparse_attention(q, store.keys, store.values, mask, causal=True)
    tolerances.same_storage(q, *decoded).check(out, expected)


def test_hidden_nan_in_packed_heads_stays_hidden(rng, isa):
    q, k, v = qkv(rng, rows=256, keys=256)
    mask = random_mask(rng, lengths=(256, 256), block_q=32, block_k=32, density=0.7)
    expected = la.block_sparse_attention(q, k, v, mask)
    hidden = ~mask.to_dense_mask()[0, 0]
    key = int(np.argmax(hidden.sum(axis=0)))
    k[:, :, key], v[:, :, key] = np.nan, np.inf
    rows = hidden[:, key]
    out = la.block_sparse_attention(q, k, v, mask)
    tolerances.same_storage(q, np.nan_to_num(k), np.ones_like(v)).check(out[:, :, rows], expected[:, :, rows])
    assert np.isnan(out[:, :, ~rows]).all()
