"""`vmoba_select` against its float64 reference, and its identities."""

from itertools import pairwise

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


@pytest.mark.parametrize(
    "options", [{"tau": 1.0}, {"top_k": 8, "scope": "query"}, {"top_k": 8}, {"top_k": 2**62}], ids=str
)
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


#: Videos one after another, one shorter than a block of two frames, some empty, and their bounds.
GRIDS = [(0, 4, 6), (2, 4, 6), (1, 4, 6), (0, 2, 3), (4, 2, 3), (2, 6, 3), (0, 4, 6)]
BOUNDS = np.concatenate([[0], np.cumsum([np.prod(grid) for grid in GRIDS])])
PACKED = (2, 1, 0.7, (2, 3), (1, 2, 3))


def packed(rng, **options):
    return qkv(rng, **{"rows": BOUNDS[-1], "keys": BOUNDS[-1]} | options)


@pytest.mark.parametrize("partition", PACKED, ids=str)
@pytest.mark.parametrize("scope", ["head", "query", "block", "all"])
def test_packed_sequences(rng, isa, partition, scope):
    q, k, v = packed(rng, heads=6, kv_heads=2, value_dim=12)
    given = {"grid": GRIDS, "partition": partition, "cu_seqlens": BOUNDS, "scope": scope}
    check(q, k, v, **given)
    check(q, k, v, **given, tau=0.6, min_extra=0, scale=0.4)


@pytest.mark.parametrize("partition", PACKED, ids=str)
@pytest.mark.parametrize("options", [{}, {"scope": "query"}, {"top_k": 2}, {"scope": "query", "top_k": 2}], ids=str)
def test_a_sequence_among_others_is_that_sequence_alone(rng, partition, options):
    q, k, v = (x[0] for x in packed(rng, value_dim=12))
    given = {"partition": partition, **options}
    whole = vmoba_select(q, k, v, grid=GRIDS, cu_seqlens=BOUNDS, **given)
    for grid, (first, last) in zip(GRIDS, pairwise(BOUNDS), strict=True):
        alone = vmoba_select(*(x[:, first:last] for x in (q, k, v)), grid=grid, **given)
        np.testing.assert_array_equal(whole[:, first:last], alone)


def test_sequences_do_not_see_each_other(rng):
    """Not even numbers that are none."""
    q, k, v = packed(rng)
    given = {"grid": GRIDS, "partition": (2, 3), "cu_seqlens": BOUNDS, "scope": "all"}
    before = vmoba_select(q, k, v, **given)
    for x in (q, k, v):
        x[:, :, BOUNDS[2] : BOUNDS[3]] = np.nan
    after = vmoba_select(q, k, v, **given)
    other = np.delete(np.arange(BOUNDS[-1]), np.arange(BOUNDS[2], BOUNDS[3]))
    np.testing.assert_array_equal(after[:, :, other], before[:, :, other])


@pytest.mark.parametrize("partition", [1, (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts_of_packed_sequences(rng, dtype, layout, partition):
    q, k, v = packed(rng, q_dtype=dtype, layout=layout)
    check(q, k, v, grid=GRIDS, partition=partition, cu_seqlens=BOUNDS)


def test_a_packed_sequence_is_one_without_bounds(rng):
    q, k, v = video(rng)
    one = vmoba_select(q, k, v, grid=GRID, partition=1, return_stats=True)
    other = vmoba_select(q, k, v, grid=[GRID], partition=1, cu_seqlens=np.array([0, 96]), return_stats=True)
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1] == other[1]


@pytest.mark.parametrize("grids", [[], [(0, 4, 6)], [(0, 4, 6), (0, 2, 3)]], ids=len)
@pytest.mark.parametrize("partition", PACKED, ids=str)
def test_no_tokens(rng, grids, partition):
    q, k, v = video(rng, rows=0, keys=0, value_dim=12)
    given = {"grid": grids, "partition": partition, "cu_seqlens": np.zeros(len(grids) + 1, int)}
    out, stats = vmoba_select(q, k, v, **given, return_stats=True)
    assert out.shape == (1, 4, 0, 12) and stats.attended == stats.scored == stats.density == 0
    for change, message in (({"tau": -1}, "tau: got -1"), ({"partition": (2,)}, r"partition: got \(2,\), expected")):
        with pytest.raises(ValueError, match=message):
            vmoba_select(q, k, v, **given | change)


def test_statistics_of_packed_sequences(rng):
    q, k, v = packed(rng)
    _, stats = vmoba_select(q, k, v, grid=GRIDS, partition=1, cu_seqlens=BOUNDS, return_stats=True)
    each = [
        vmoba_select(*(x[:, :, a:b] for x in (q, k, v)), grid=grid, partition=1, return_stats=True)[1]
        for grid, (a, b) in zip(GRIDS, pairwise(BOUNDS), strict=True)
    ]
    assert stats.attended == sum(x.attended for x in each) and stats.scored == sum(x.scored for x in each)
    assert stats.density == stats.attended / (4 * int((np.diff(BOUNDS) ** 2).sum()))
    _, every = vmoba_select(q, k, v, grid=GRIDS, partition=1, cu_seqlens=BOUNDS, tau=1.0, return_stats=True)
    assert every.density == 1


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
        ({"grid": (4, 4, 5)}, ValueError, r"grid: got \(4, 4, 5\) for 96 tokens"),
        ({"grid": (10**9, 10**9, 10**9)}, ValueError, "grid: got .* for 96 tokens, expected as many"),
        ({"keys": 90}, ValueError, "k: got 90 tokens, expected 96 as in q"),
        ({"partition": (3, 3)}, ValueError, r"partition: got \(3, 3\), expected divisors"),
        ({"partition": (3,)}, ValueError, r"partition: got \(3,\)"),
        ({"partition": 0.01}, ValueError, r"partition: got 0.01"),
        ({"scope": "none"}, ValueError, r"scope: got 'none'"),
        ({"scope": "all", "top_k": 2}, ValueError, r"scope: got 'all' with top_k"),
        ({"tau": -0.1}, ValueError, r"tau: got -0.1"),
        ({"min_extra": -1}, ValueError, r"min_extra: got -1"),
    ],
)
def test_bad_arguments(rng, change, error, message, nothing_moves):
    sizes, change = sizes_of(change)
    with pytest.raises(error, match=message):
        vmoba_select(*video(rng, **sizes), **{"grid": GRID, "partition": (2, 3)} | change)


def sizes_of(change):
    """What of a change the arrays have, and what is passed."""
    sizes = {name: change[name] for name in ("batch", "keys") if name in change}
    return sizes, {name: value for name, value in change.items() if name not in sizes}


@pytest.fixture
def nothing_moves(monkeypatch):
    """Errors come before tokens are put in order."""
    monkeypatch.setattr(np, "take", lambda *_, **__: pytest.fail("tokens were moved"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens": np.array([0, 40, 95])}, ValueError, "cu_seqlens: got bounds from 0 to 95, expected 0 to 96"),
        ({"cu_seqlens": np.array([1, 48, 96])}, ValueError, "cu_seqlens: got bounds from 1 to 96"),
        ({"cu_seqlens": np.array([0, 100, 96])}, ValueError, "cu_seqlens: got 100, then 96 at 2"),
        ({"cu_seqlens": np.array([[0, 96]])}, ValueError, "cu_seqlens: got shape"),
        ({"cu_seqlens": np.zeros(0, int)}, ValueError, "cu_seqlens: got shape"),
        ({"cu_seqlens": np.array([0.0, 48.0, 96.0])}, TypeError, "cu_seqlens: got dtype float64"),
        ({"cu_seqlens": (0, 48, 96)}, TypeError, "cu_seqlens: got tuple"),
        ({"batch": 2}, ValueError, "cu_seqlens: got it with a batch of 2, expected 1"),
        (
            {"grid": GRID},
            TypeError,
            r"grid: got \(4, 4, 6\) with cu_seqlens, expected \(frames, height, width\) of each",
        ),
        ({"grid": 3}, TypeError, "grid: got 3 with cu_seqlens"),
        ({"grid": [GRID]}, ValueError, "grid: got 1 with cu_seqlens, expected 2, one per sequence"),
        ({"grid": [(2, 4, 6), (4, 6)]}, TypeError, r"grid: got \(4, 6\), expected"),
        ({"grid": [(2, 4, 6), (-1, 4, 6)]}, ValueError, "grid: got -1"),
        ({"grid": [(2, 4, 6), (2, 4, 5)]}, ValueError, r"grid: got \(2, 4, 5\) for the 48 tokens of sequence 1"),
        ({"grid": [(2, 4, 6), (10**9,) * 3]}, ValueError, "grid: got .* for the 48 tokens of sequence 1"),
        ({"grid": [(2, 4, 6), (2, 3, 8)], "partition": (4, 3)}, ValueError, r"partition: got \(4, 3\), expected"),
        ({"keys": 90}, ValueError, "k: got 90 tokens, expected 96 as in q"),
        ({"scope": "none"}, ValueError, "scope: got 'none'"),
        ({"top_k": 0}, ValueError, "top_k: got 0"),
    ],
)
def test_bad_arguments_of_packed_sequences(rng, change, error, message, nothing_moves):
    sizes, change = sizes_of(change)
    given = {"grid": [(2, 4, 6)] * 2, "partition": (2, 3), "cu_seqlens": np.array([0, 48, 96])} | change
    with pytest.raises(error, match=message):
        vmoba_select(*video(rng, **sizes), **given)
