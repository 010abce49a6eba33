"""`pooled_block_select_cdf` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import hilbert_order, pooled_block_select_cdf
from random_arrays import DTYPES, LAYOUTS, qkv

SMALL = {"frames": 3, "special": 2, "block_q": 16, "block_k": 8}


def tokens(rng, **options):
    return qkv(rng, **{"rows": 3 * 37, "keys": 3 * 37, "spread": 2.0} | options)


def check(q, k, v, **options):
    out = pooled_block_select_cdf(q, k, v, **SMALL | options)
    assert out.dtype == q.dtype
    expected = reference.pooled_block_select_cdf(q, k, v, **SMALL | options)
    tolerances.attention(q, k, v).check(out, expected)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2)])
def test_reference(rng, isa, heads, kv_heads):
    q, k, v = tokens(rng, batch=2, heads=heads, kv_heads=kv_heads, value_dim=12)
    for options in ({}, {"tau": 0.5, "rho": None}, {"tau": None, "rho": 0.6}, {"tau": 0.4, "rho": 0.9}):
        check(q, k, v, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    check(*tokens(rng, q_dtype=dtype, layout=layout), tau=0.6, rho=None)


def test_small_integers_of_numpy_do_not_wrap_around(rng):
    q, k, v = qkv(rng, rows=280, keys=280)
    options = {"frames": 4, "special": 10, "block_q": 16, "block_k": 16, "tau": 0.5}
    out = pooled_block_select_cdf(q, k, v, **options | {"frames": np.uint8(4), "special": np.uint8(10)})
    np.testing.assert_array_equal(out, pooled_block_select_cdf(q, k, v, **options))


def test_any_number_of_threads(rng, threads):
    check(*tokens(rng), tau=0.6, rho=None)


# Identities


@pytest.mark.parametrize("options", [{"tau": None, "rho": 0.0}, {"tau": 1.0, "rho": None}], ids=str)
def test_all_of_it_is_dense_attention(rng, isa, options):
    q, k, v = tokens(rng)
    out = pooled_block_select_cdf(q, k, v, **SMALL | options)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v))


def test_groups_of_one_patch_take_the_fewest_with_the_share(rng, isa):
    q, k, v = tokens(rng, heads=2)
    options = {"frames": 3, "special": 0, "block_q": 1, "block_k": 1, "tau": 0.7, "rho": None}
    weights = la.dense.attention_weights(q, k, rows=np.arange(111)).astype(float)
    order = np.argsort(-weights, axis=-1, kind="stable")
    sums = np.cumsum(np.take_along_axis(weights, order, axis=-1), axis=-1)
    mask = np.zeros(weights.shape, bool)
    np.put_along_axis(mask, order, sums - np.take_along_axis(weights, order, axis=-1) < 0.7, axis=-1)
    out = pooled_block_select_cdf(q, k, v, **options)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, mask=mask))


def test_the_mean_key_does_not_matter(rng, isa):
    q, k, v = tokens(rng)
    one, other = (
        pooled_block_select_cdf(q, x, v, **SMALL, tau=0.6, rho=None) for x in (k, k - k.mean(axis=2, keepdims=True))
    )
    tolerances.same_storage(q, k, v).check(one, other)


def test_without_special_tokens_it_is_block_sparse(rng, isa):
    q, k, v = tokens(rng, rows=96, keys=96)
    options = {**SMALL, "special": 0, "tau": 0.5, "rho": None}
    out, stats = pooled_block_select_cdf(q, k, v, **options, return_stats=True)
    mask = reference.patch_mask(q, k, **options)
    blocks = la.BlockMask.from_blocks(mask[:, :, ::16, ::8], lengths=(96, 96), block_q=16, block_k=8)
    tolerances.same_storage(q, k, v).check(out, la.block_sparse_attention(q, k, v, blocks))
    assert stats.density == pytest.approx(blocks.density())


def test_the_order_changes_only_the_groups(rng, isa):
    q, k, v = tokens(rng, rows=3 * 37, keys=3 * 37)
    order = hilbert_order(5, 7)
    check(q, k, v, order=order, tau=0.5, rho=None)
    out = pooled_block_select_cdf(q, k, v, **SMALL, tau=1.0, order=order)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (5, 7), (8, 3), (16, 16)])
def test_hilbert_order(height, width):
    order = hilbert_order(height, width)
    np.testing.assert_array_equal(np.sort(order), np.arange(height * width))
    if height == width:
        y, x = order // width, order % width
        assert (np.abs(np.diff(y)) + np.abs(np.diff(x)) == 1).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"frames": 2}, ValueError, r"frames: got 2 of 111 tokens"),
        ({"special": 40}, ValueError, r"frames: got 3 of 111 tokens"),
        ({"tau": None, "rho": None}, ValueError, r"tau: got None, as is rho"),
        ({"rho": 1.5}, ValueError, r"rho: got 1.5"),
        ({"tau": -0.5}, ValueError, r"tau: got -0.5"),
        ({"block_q": 0}, ValueError, r"block_q: got 0"),
        ({"order": np.zeros(35, int)}, ValueError, r"order: got an array \(35,\), expected a permutation of 35"),
        ({"order": np.zeros(35)}, TypeError, r"order: got dtype float64"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = tokens(rng)
    with pytest.raises(error, match=message):
        pooled_block_select_cdf(q, k, v, **SMALL | change)
