"""`rectified_block_sparse` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import DynamicBlocks, rectified_block_sparse
from random_arrays import DTYPES, F32, LAYOUTS, normal, qkv

SMALL = {"text": 9, "block": 16}
#: A mask of other lengths.
OTHER = la.BlockMask.from_blocks(np.ones((2, 2), bool), lengths=(32, 32), block_q=16, block_k=16)


def tokens(rng, **options):
    """Rows that are alike inside blocks, so that some pairs are certain."""
    q, k, v = qkv(rng, **{"rows": 105, "keys": 105, "spread": 2.0} | options)
    for x in (q, k):
        runs = np.repeat(rng.standard_normal((*x.shape[:2], 7, x.shape[3])), 16, axis=2)[:, :, :105]
        x[:] = (2 * runs + 0.2 * np.asarray(x, np.float32)).astype(x.dtype)
    return q, k, v


def check(q, k, v, **options):
    out = rectified_block_sparse(q, k, v, **SMALL | options)
    assert out.dtype == q.dtype
    expected = reference.rectified_block_sparse(q, k, v, **SMALL | options)
    one = tolerances.attention(q, k, v)
    # The part from means and the other part are each rounded to storage.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=4 * one.atol, rtol=4 * one.rtol)
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2)])
def test_reference(rng, isa, heads, kv_heads):
    q, k, v = tokens(rng, batch=2, heads=heads, kv_heads=kv_heads, value_dim=12)
    near = np.abs(np.subtract.outer(np.arange(6), np.arange(6))) < 2
    for options in ({}, {"tau": 0.3, "top_k": 2}, {"neighbours": near, "first_frame_blocks": 2}, {"weigh_last": False}):
        check(q, k, v, **options)
    check(q, k, v, text=0, tau=0.2)
    # Something was made up for.
    assert (check(q, k, v, tau=0.1) != rectified_block_sparse(q, k, v, **SMALL, tau=0.1, compensate="none")).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, v = qkv(rng, rows=105, keys=105, q_dtype=dtype, layout=layout)
    out = np.asarray(rectified_block_sparse(q, k, v, **SMALL, tau=0.4), np.float64)
    expected = reference.rectified_block_sparse(q, k, v, **SMALL, tau=0.4)
    rounding = 4 * tolerances.ROUNDOFF[dtype][0] * np.abs(np.asarray(v, np.float64)).max()
    assert np.abs(out - expected).max() <= 4 * tolerances.attention(q, k, v).atol + rounding + (dtype == F32) * 1e-5


def test_any_number_of_threads(rng, threads):
    check(*tokens(rng), tau=0.3)


def some_blocks(heads, density=0.4, block=16):
    """Blocks that do not depend on the numbers, at least the own one."""

    def select(q, k, *, causal, scale):
        assert not causal
        lengths = q.shape[2], k.shape[2]
        n = -(-lengths[0] // block)
        blocks = (np.random.default_rng(3).random((heads, n, n)) < density) | np.eye(n, dtype=bool)
        return la.BlockMask.from_blocks(blocks, lengths=lengths, block_q=block, block_k=block)

    return select


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("block", [16, 48])
def test_blocks_of_a_selector(rng, isa, heads, block):
    q, k, v = tokens(rng, batch=2, heads=6, kv_heads=2)
    check(q, k, v, selector=some_blocks(heads, block=block), first_frame_blocks=2)
    check(q, k, v, selector=some_blocks(heads, block=block), compensate="none")


def test_what_selectors_leave_out_is_made_up_for(rng, isa):
    """Nearer to dense attention than without, for rows that are alike inside blocks."""
    q, k, v = tokens(rng, spread=0.3)
    exact, errors = la.attention(q, k, v), []
    for compensate in ("certain", "none"):
        options = {"compensate": compensate, "selector": DynamicBlocks(top_k=1, block=16), **SMALL}
        out, stats = rectified_block_sparse(q, k, v, return_stats=True, **options)
        errors.append(np.abs(out - exact).max())
        assert stats.density < 0.5 and stats.scored == 4 * 6 * (6 + 15)
    assert errors[0] < 0.5 * errors[1]


# Identities


def test_a_selector_of_all_blocks_gives_dense_attention(rng, isa):
    q, k, v = tokens(rng)
    out = rectified_block_sparse(q, k, v, **SMALL, selector=some_blocks(1, density=1.1))
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v))


def test_all_blocks_give_dense_attention(rng, isa):
    q, k, v = tokens(rng)
    out = rectified_block_sparse(q, k, v, **SMALL, tau=1.0)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v))


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6])
def test_equal_rows_of_blocks_give_dense_attention(rng, isa, tau):
    q, k, v = (np.repeat(normal(rng, (1, 2, 7, 16)), 16, axis=2)[:, :, :105] for _ in range(3))
    out = rectified_block_sparse(q, k, v, text=0, block=16, tau=tau)
    one = tolerances.same_storage(q, k, v)
    np.testing.assert_allclose(out, la.attention(q, k, v), atol=4 * one.atol, rtol=4 * one.rtol)


def test_without_compensation_it_is_block_sparse(rng, isa):
    q, k, v = tokens(rng)
    out, stats = rectified_block_sparse(q, k, v, **SMALL, tau=0.4, compensate="none", return_stats=True)
    expected = reference.rectified_block_sparse(q, k, v, **SMALL, tau=0.4, compensate="none")
    tolerances.attention(q, k, v).check(out, expected)
    assert 0 < stats.density < 1 and stats.scored == 4 * 6 * 15


def test_factors_sum_to_one(rng, isa):
    q, k, v = tokens(rng)
    v[:] = np.arange(16)
    out = rectified_block_sparse(q, k, v, **SMALL, tau=0.2)
    np.testing.assert_allclose(out, np.broadcast_to(np.arange(16), out.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text": 200}, ValueError, r"text: got 200"),
        ({"block": 0}, ValueError, r"block: got 0"),
        ({"tau": -1.0}, ValueError, r"tau: got -1.0"),
        ({"compensate": "all"}, ValueError, r"compensate: got 'all'"),
        ({"neighbours": np.ones((2, 2), bool)}, ValueError, r"neighbours: got shape \(2, 2\), expected \(6, 6\)"),
        ({"neighbours": np.ones((6, 6))}, TypeError, r"neighbours: got dtype float64"),
        ({"selector": 3}, TypeError, r"selector: got int, expected a selector"),
        ({"selector": DynamicBlocks(block=24)}, ValueError, r"selector: got blocks of 24 queries and 24 keys from it"),
        ({"selector": lambda q, k, **_: 3}, TypeError, r"selector: got int from it, expected a BlockMask"),
        ({"selector": 3, "text": 105}, TypeError, r"selector: got int, expected a selector"),
        ({"selector": some_blocks(3)}, ValueError, r"selector: got 3 heads, expected 4 query heads, 2 KV heads"),
        ({"selector": lambda q, k, **_: OTHER}, ValueError, r"selector: got lengths \(32, 32\), expected \(96, 96\)"),
        ({"k": np.zeros((1, 2, 9, 16), np.float32), "v": np.zeros((1, 2, 9, 16), np.float32)}, ValueError, r"k: got 9"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = tokens(rng)
    with pytest.raises(error, match=message):
        rectified_block_sparse(**{"q": q, "k": k, "v": v} | SMALL | change)
