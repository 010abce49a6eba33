"""Masks, lists and selectors that are made of others."""

import ml_dtypes
import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.sparse import Antidiagonal, DynamicBlocks, Intersection, Moba, PerHead, Sparge, Union, VerticalSlash
from longattn.sparse.ways import PROMPT_WAYS
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
    ax = lists.plot(head=1, cells=65)
    (drawn,) = ax.collections
    shares = lists.to_dense_mask()[0, 1, lists.query_bounds[:-1]].reshape(-1, 65, 2).mean(axis=-1)
    np.testing.assert_array_equal(drawn.get_array(), shares)
    assert 0 < shares.mean() < 1
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


@pytest.mark.parametrize("rows", [1, 5, 9])
@pytest.mark.parametrize("way", PROMPT_WAYS, ids=lambda way: way.name)
def test_prompts_shorter_than_a_block(rng, way, rows):
    """Selectors take them whole: what is left of a block is a block."""
    q, k, v = qkv(rng, rows=rows, keys=9)
    chosen = way.selector(q, k, causal=True, scale=None)
    out = la.sparse_attention(q, k, v, chosen, causal=True)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))
    if isinstance(chosen, la.BlockMask):
        assert chosen.block_q <= rows and chosen.block_k <= 9


def test_selectors_by_operators(rng):
    q, k, v = qkv(rng, rows=96, keys=96)
    one, other = Sparge(block_q=32, block_k=24, theta=0.0, cdf=0.6), DynamicBlocks(top_k=1, block=16)
    masks = [x(q, k, causal=True).to_dense_mask() for x in (one, other)]
    assert masks[0].mean() > masks[1].mean() > 0
    for made, expected in ((one | other, masks[0] | masks[1]), (one & other, masks[0] & masks[1])):
        chosen = made(q, k, causal=True)
        assert isinstance(chosen, la.BlockMask) and (chosen.block_q, chosen.block_k) == (16, 8)
        np.testing.assert_array_equal(chosen.to_dense_mask(), expected)
        out = la.sparse_attention(q, k, v, made, causal=True)
        tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, mask=expected, causal=True))

    def first_keys(q, k, *, causal, scale):
        return la.BlockMask.from_blocks(np.eye(1, 12, dtype=bool), lengths=(96, 96), block_q=96, block_k=8)

    for made in (first_keys | one, one | first_keys, first_keys | (one & one)):
        chosen = made(q, k, causal=True).to_dense_mask()
        np.testing.assert_array_equal(chosen, masks[0] | (np.arange(96) < 8))
    np.testing.assert_array_equal((first_keys & one)(q, k).to_dense_mask()[..., 8:], False)


def test_selectors_of_different_kinds(rng):
    q, k, v = qkv(rng, rows=96, keys=96)
    blocks, keys = DynamicBlocks(top_k=2, block=16), VerticalSlash(vertical=3, slash=5, last_q=8, n_sink=1, local=2)
    masks = [x(q, k, causal=True).to_dense_mask() for x in (blocks, keys)]
    assert not (masks[0] <= masks[1]).all() and not (masks[1] <= masks[0]).all()
    table = np.stack([masks[i][:, h] for h, i in enumerate((0, 1, 1, 0))], axis=1)
    for made, expected in (
        (blocks | keys, masks[0] | masks[1]),
        (keys & blocks, masks[0] & masks[1]),
        (PerHead([blocks, keys], [0, 1, 1, 0]), table),
        (blocks | keys | Moba(block=32, top_k=1), masks[0] | masks[1] | Moba(block=32, top_k=1)(q, k).to_dense_mask()),
    ):
        chosen = made(q, k, causal=True)
        assert isinstance(chosen, la.RowLists)
        np.testing.assert_array_equal(chosen.to_dense_mask(), expected)
        out = la.sparse_attention(q, k, v, made, causal=True)
        tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, mask=expected, causal=True))


@pytest.mark.parametrize(
    ("one", "other", "sizes"),
    [
        ({"block_q": 16, "block_k": 8}, {"block_q": 16, "block_k": 12}, (16, 16, 4)),
        ({"block_q": 16, "block_k": 8}, {"block_q": 24, "block_k": 8}, (8, 8, 8)),
        ({"block_q": 16, "first_q": 4}, {"block_q": 8}, (4, 4, 8)),
        ({"block_q": 16, "first_q": 6}, {"block_q": 32, "first_q": 22, "block_k": 64}, (16, 6, 8)),
        ({"block_q": 7, "block_k": 9}, {"block_q": 5, "block_k": 4}, (1, 1, 1)),
        ({"block_q": 100, "block_k": 130}, {"block_q": 6, "block_k": 10}, (6, 6, 10)),
        ({"heads": 2, "batch": 2}, {"heads": 4, "block_k": 4}, (16, 16, 4)),
        ({"heads": 1}, {"heads": 3}, (16, 16, 8)),
    ],
)
def test_masks_of_different_blocks(rng, one, other, sizes):
    masks = random_mask(rng, **one), random_mask(rng, **other)
    dense = [x.to_dense_mask() for x in masks]
    heads = max(x.shape[1] for x in dense)
    dense = [np.repeat(x, heads // x.shape[1], axis=1) for x in dense]
    for made, expected in ((masks[0] | masks[1], dense[0] | dense[1]), (masks[1] & masks[0], dense[0] & dense[1])):
        assert (made.block_q, made.first_q, made.block_k) == sizes
        np.testing.assert_array_equal(made.to_dense_mask(), expected)
    lists = random_lists(rng, block_q=10, heads=heads)
    for made, expected in (
        (masks[0] | lists, dense[0] | lists.to_dense_mask()),
        (lists & masks[1], dense[1] & lists.to_dense_mask()),
    ):
        assert isinstance(made, la.RowLists)
        np.testing.assert_array_equal(made.to_dense_mask(), expected)


def test_bad_combinations(rng):
    mask, lists = random_mask(rng, heads=2), random_lists(rng, heads=3)
    with pytest.raises(ValueError, match=r"other: got shapes \[\(1, 2\), \(1, 3\)\] of batch and heads, expected"):
        mask | lists
    with pytest.raises(ValueError, match=r"other: got lengths \(8, 130\), expected \(100, 130\)"):
        mask & random_mask(rng, lengths=(8, 130))
    with pytest.raises(ValueError, match=r"other: got lists with a bias, expected none"):
        mask | random_lists(rng, bias=True)
    with pytest.raises(TypeError, match=r"other: got int, expected a selector"):
        DynamicBlocks() | 3
    with pytest.raises(TypeError, match=r"other: got int, expected a selector"):
        3 & DynamicBlocks()
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


@pytest.mark.parametrize(
    ("selector", "sizes"),
    [
        (la.sparse.Anchor, {"block": 128, "step": 2}),
        (la.sparse.FlexPrefill, {"block": 128, "min_budget": 200}),
        (DynamicBlocks, {"top_k": 1, "block": 128}),
        (Moba, {"block": 128, "top_k": 2}),
        (Sparge, {"block_q": 128, "block_k": 64}),
        (VerticalSlash, {"last_q": 64, "vertical": 9, "slash": 9, "block_q": 128}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_small_integers_of_numpy_do_not_wrap_around(rng, selector, sizes):
    q, k, _ = qkv(rng, rows=300, keys=300)
    plain = selector(**sizes)
    numpy = selector(**{name: np.uint8(size) for name, size in sizes.items()})
    np.testing.assert_array_equal(numpy(q, k, causal=True).to_dense_mask(), plain(q, k, causal=True).to_dense_mask())


@pytest.mark.parametrize("sizes", [{"block": 2**62}, {"step": 2**62}, {"init_blocks": 2**62}])
def test_large_groups_are_the_whole(rng, sizes):
    q, k, v = qkv(rng, rows=60, keys=60)
    out = la.sparse_attention(q, k, v, la.sparse.Anchor(**{"block": 2**40} | sizes), causal=True)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


def test_integers_have_64_bits():
    with pytest.raises(ValueError, match="top_k: got 9223372036854775808, expected an integer of 64 bits"):
        DynamicBlocks(top_k=2**63)


@pytest.mark.parametrize("shape", [(), (2, 8, 0)])
def test_queries_of_no_width(shape):
    x = np.ones((2, 8, 4), np.float32)
    with pytest.raises(ValueError, match=r"^q: got shape"):
        la.sparse_attention(np.ones(shape, np.float32), x, x, Moba())


@pytest.mark.parametrize(
    ("selector", "name"),
    [
        (la.sparse.Antidiagonal, "threshold"),
        (la.sparse.FlexPrefill, "gamma"),
        (la.sparse.Sale, "tau"),
        (la.sparse.Sparge, "theta"),
        (la.sparse.Sparge, "cdf"),
        (la.sparse.Sparge, "topk"),
    ],
)
def test_bad_numbers_are_refused_where_they_are_given(selector, name):
    """Not at the first prompt."""
    for value in ("words", True, [0.5], 1j, float("nan"), np.zeros((2, 2), np.float32)):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: got "):
            selector(**{name: value})
    selector(**{name: np.full(4, 0.5, np.float32)})
