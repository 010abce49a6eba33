"""`vmoba_select` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import Moba, vmoba_blocks, vmoba_partition, vmoba_select
from random_arrays import DTYPES, LAYOUTS, qkv

GRID = (4, 4, 6)
PARTITIONS = (1, 0.7, (2, 3), (2, 2, 2))


def video(rng, **options):
    return qkv(rng, **{"rows": 96, "keys": 96} | options)


def check(q, k, v, **options):
    options = {"grid": GRID, "partition": (2, 3)} | options
    out = vmoba_select(q, k, v, **options)
    assert out.dtype == q.dtype
    tolerances.attention(q, k, v).check(out, reference.vmoba_select(q, k, v, **options))


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@pytest.mark.parametrize("scope", ["head", "query", "block", "all"])
def test_reference(rng, isa, partition, scope):
    q, k, v = video(rng, batch=2, heads=6, kv_heads=2, value_dim=12)
    check(q, k, v, partition=partition, scope=scope)
    check(q, k, v, partition=partition, scope=scope, tau=0.6, min_extra=0)


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@pytest.mark.parametrize("scope", ["head", "query"])
def test_numbers_of_blocks(rng, isa, partition, scope):
    check(*video(rng, batch=2), partition=partition, scope=scope, top_k=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    check(*video(rng, q_dtype=dtype, layout=layout), scale=None)


def test_any_number_of_threads(rng, threads):
    check(*video(rng), scope="query")


# Identities


@pytest.mark.parametrize("options", [{"tau": 1.0}, {"top_k": 8, "scope": "query"}, {"top_k": 8}], ids=str)
def test_all_blocks_give_dense_attention(rng, isa, options):
    q, k, v = video(rng)
    out = vmoba_select(q, k, v, grid=GRID, partition=(2, 3), **options)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v))


@pytest.mark.parametrize("scope", ["head", "query", "block", "all"])
def test_a_single_block_is_dense_attention(rng, isa, scope):
    q, k, v = video(rng)
    out = vmoba_select(q, k, v, grid=GRID, partition=(4, 6), scope=scope)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v))


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@pytest.mark.parametrize("scope", ["head", "query", "all"])
def test_no_share_and_nothing_extra_is_attention_inside_blocks(rng, isa, partition, scope):
    q, k, v = video(rng)
    numbers = reference.block_numbers(GRID, partition)
    out = vmoba_select(q, k, v, grid=GRID, partition=partition, tau=0.0, min_extra=0, scope=scope)
    expected = la.attention(q, k, v, mask=numbers[:, None] == numbers)
    tolerances.same_storage(q, k, v).check(out, expected)


def test_a_number_for_each_query_is_moba(rng, isa):
    q, k, _ = video(rng)
    ours = vmoba_blocks(q, k, block=24, top_k=2, scope="query").blocks()
    np.testing.assert_array_equal(ours, Moba(block=24, top_k=2)(q, k, causal=False).blocks())


def test_the_order_of_blocks_does_not_matter(rng, isa):
    q, k, v = video(rng)
    order = np.arange(96).reshape(4, 24)[[2, 0, 3, 1]].ravel()
    whole = vmoba_select(q, k, v, grid=GRID, partition=1)
    moved = vmoba_select(*(x[:, :, order] for x in (q, k, v)), grid=GRID, partition=1)
    tolerances.same_storage(q, k, v).check(moved, whole[:, :, order])


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_partition(partition):
    order, size = vmoba_partition(GRID, partition)
    np.testing.assert_array_equal(np.sort(order), np.arange(96))
    np.testing.assert_array_equal(reference.block_numbers(GRID, partition)[order], np.arange(96) // size)


def test_statistics(rng):
    q, k, v = video(rng)
    _, stats = vmoba_select(q, k, v, grid=GRID, partition=1, return_stats=True)
    assert 0.25 < stats.density < 1 and stats.scored == 4 * 96 * 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": (4, 4)}, TypeError, r"grid: got \(4, 4\)"),
        ({"grid": (4, 4, 5)}, ValueError, r"grid: got \(4, 4, 5\) for 96 queries"),
        ({"partition": (3, 3)}, ValueError, r"partition: got \(3, 3\), expected divisors"),
        ({"partition": (3,)}, ValueError, r"partition: got \(3,\)"),
        ({"partition": 0.01}, ValueError, r"partition: got 0.01"),
        ({"scope": "none"}, ValueError, r"scope: got 'none'"),
        ({"scope": "all", "top_k": 2}, ValueError, r"scope: got 'all' with top_k"),
        ({"tau": -0.1}, ValueError, r"tau: got -0.1"),
        ({"min_extra": -1}, ValueError, r"min_extra: got -1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = video(rng)
    with pytest.raises(error, match=message):
        vmoba_select(q, k, v, **{"grid": GRID, "partition": 1} | change)
