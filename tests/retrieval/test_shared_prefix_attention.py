"""Sequences that begin alike: one scan for all of them gives what attention over each whole sequence gives."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from longattn.retrieval import shared_prefix_attention
from random_arrays import BF16, DTYPES, F32, normal
from random_stores import rows, store_of

#: (sequences, query heads, KV heads, queries, head_dim, value_dim)
SHAPES = [(1, 1, 1, 1, 16, 16), (5, 6, 2, 1, 32, 24), (3, 4, 4, 3, 20, 40), (9, 16, 2, 2, 16, 16)]
PREFIX = 1500


def _case(rng, shape, *, dtype=F32, tails=None, prefix=PREFIX):
    batch, heads, kv_heads, queries, dim, value_dim = shape
    whole = rows(rng, kv_heads, prefix, dim, value_dim)
    lengths = tails or [queries + 37 * b for b in range(batch)]
    own = [store_of(*rows(rng, kv_heads, length, dim, value_dim), dtype) for length in lengths]
    q = normal(rng, (batch, heads, queries, dim), spread=1.5).astype(dtype)
    return q, store_of(*whole, dtype), own


def _dense(q, prefix, tails, **options):
    """Attention over each whole sequence."""
    parts = []
    for one, tail in zip(q.astype(np.float32), tails, strict=True):
        k, v = (np.concatenate([getattr(prefix, n), getattr(tail, n)], 1) for n in ("keys", "values"))
        parts.append(la.attention(one, k, v, causal=True, return_lse=True, **options))
    return np.stack([out for out, _ in parts]), np.stack([lse for _, lse in parts])


def _check(q, prefix, tails, result, out, lse):
    for b, tail in enumerate(tails):
        k, v = (np.concatenate([getattr(prefix, n), getattr(tail, n)], 1) for n in ("keys", "values"))
        tolerance = tolerances.same_storage(q[b], k, v, together=8)
        tolerance.check(result.out[b], out[b], result.lse[b], lse[b])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rest", ["values", "none"])
def test_budgets_of_every_row_are_dense_attention(rng, isa, shape, dtype, rest):
    q, prefix, tails = _case(rng, shape, dtype=dtype)
    sink_logits = normal(rng, (shape[1],), spread=2.0)
    result = shared_prefix_attention(
        q, prefix, la.index.Signatures(prefix), tails, top_k=PREFIX, rest=rest, sink_logits=sink_logits
    )
    assert result.out.dtype == q.dtype and result.lse.dtype == np.float32
    _check(q, prefix, tails, result, *_dense(q, prefix, tails, sinks=sink_logits))


def test_one_scan_serves_up_to_64_queries(rng):
    q, prefix, tails = _case(rng, (9, 16, 2, 2, 16, 16))
    index = la.index.Signatures(prefix)
    result = shared_prefix_attention(q, prefix, index, tails, top_k=40, return_selected=True)
    # 8 heads a group: 8 of the 18 queries in a scan.
    assert result.queries_per_scan == 8 and len(result.stats) == 3
    assert [stats.missed_mass.shape for stats in result.stats] == [(2 * 8 * 8, 1), (2 * 8 * 8, 1), (2 * 2 * 8, 1)]
    for stats in result.stats:
        assert (stats.keys_scored == len(index) - 4).all()
        assert all(len(picked) == 40 for (picked,) in stats.selected)
    assert shared_prefix_attention(q, prefix, index, tails, return_stats=False).stats == ()


def test_rows_read_are_exact(rng, isa, threads):
    """With nothing estimated, the softmax over the rows of the prefix that were read and the whole tail."""
    shape = (4, 4, 2, 2, 24, 24)
    q, prefix, tails = _case(rng, shape)
    index = la.index.Signatures(prefix)
    result = shared_prefix_attention(q, prefix, index, tails, top_k=60, sinks=3, rest="none", return_selected=True)
    (stats,) = result.stats
    for b, tail in enumerate(tails):
        keys, values = (np.concatenate([getattr(prefix, n), getattr(tail, n)], 1) for n in ("keys", "values"))
        picked = [[stats.selected[h][0]] * 2 for h in range(2)]
        # Rows behind those with a code are read: of the prefix, and the tail.
        oracle = reference.attention(q[b], keys, values, picked, len(index), sinks=3, window=0)
        tolerance = tolerances.attention(q[b], keys, values, together=8)
        tolerance.check(result.out[b], oracle.out, result.lse[b], oracle.lse)


def test_one_sequence_is_retrieval_over_all_its_rows(rng):
    """One query, a tail as long as the window: the rows are those that retrieval over one store selects and reads."""
    q, prefix, (tail,) = _case(rng, (1, 4, 2, 1, 32, 32), prefix=1600, tails=[64])
    whole = store_of(*(np.concatenate([getattr(prefix, n), getattr(tail, n)], 1) for n in ("keys", "values")))
    index = la.index.Flat(prefix)
    result = shared_prefix_attention(q, prefix, index, [tail], top_k=50, return_selected=True)
    alone = la.retrieval_attention(q[0], whole, la.index.Flat(whole), top_k=50, window=64, return_selected=True)
    for h in range(2):
        # Tails take part in the heads' shares there, not here: few rows differ.
        assert len(np.intersect1d(result.stats[0].selected[h][0], alone.stats.selected[h][0])) >= 40
    assert (result.stats[0].keys_attended == 4 + 50).all()


def test_tails_with_indexes(rng, isa):
    shape = (3, 4, 2, 1, 32, 32)
    q, prefix, tails = _case(rng, shape, tails=[900, 1, 2000])
    indexes = [la.index.Signatures(tail) for tail in tails]
    index = la.index.Signatures(prefix)
    every = shared_prefix_attention(q, prefix, index, tails, indexes, top_k=PREFIX, tail_top_k=2000)
    _check(q, prefix, tails, every, *_dense(q, prefix, tails))
    few = shared_prefix_attention(q, prefix, index, tails, indexes, top_k=PREFIX, tail_top_k=50, window=20)
    assert 0 < np.abs(few.out - every.out).max() < 0.2


def _tree(rng, tails, dtype, *, shared=20, chunk_size=8):
    """A tree whose sequences begin alike, two by two, and stores with the same rows."""
    kv_heads, dim, value_dim = tails[0].kv_heads, tails[0].head_dim, tails[0].value_dim
    tree = la.kv.PrefixTree(kv_heads, dim, value_dim, dtype, chunk_size, capacity=1 << 14)
    stores = []
    for b, tail in enumerate(tails):
        if b % 2 == 0:
            common = rows(rng, kv_heads, shared, dim, value_dim)
        k, v = (np.concatenate([c, t], 1) for c, t in zip(common, (tail.keys, tail.values), strict=True))
        k, v = k.astype(dtype), v.astype(dtype)
        tokens = [
            *range(1000 * (b // 2), 1000 * (b // 2) + shared),
            *range(10**6 * (b + 1), 10**6 * (b + 1) + len(tail)),
        ]
        assert tree.add_seq(tokens, k, v) == b
        stores.append(store_of(k, v, dtype))
    return tree, stores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 6, 2, 1, 32, 24), (9, 8, 1, 1, 16, 16)], ids=str)
def test_tails_in_a_tree(rng, isa, shape, dtype):
    """What the same tails in stores give; and with a budget of every row, dense attention."""
    q, prefix, own = _case(rng, shape, dtype=dtype)
    tree, tails = _tree(rng, own, dtype)
    # Common beginnings are stored, and read, once.
    assert tree.tokens_stored < sum(len(tail) for tail in tails)
    index = la.index.Signatures(prefix)
    sink_logits = normal(rng, (shape[1],), spread=2.0)
    few = shared_prefix_attention(q, prefix, index, tree, top_k=50, sink_logits=sink_logits)
    same = shared_prefix_attention(q, prefix, index, tails, top_k=50, sink_logits=sink_logits)
    assert few.out.dtype == q.dtype and few.out.shape == same.out.shape
    _check(q, prefix, tails, few, same.out, same.lse)
    every = shared_prefix_attention(q, prefix, index, tree, top_k=PREFIX, sink_logits=sink_logits)
    _check(q, prefix, tails, every, *_dense(q, prefix, tails, sinks=sink_logits))


def test_some_sequences_of_a_tree(rng):
    q, prefix, own = _case(rng, (5, 4, 2, 1, 16, 16))
    tree, tails = _tree(rng, own, F32)
    index = la.index.Flat(prefix)
    chosen = [3, 0, 4]
    some = shared_prefix_attention(q[chosen], prefix, index, tree, sequences=chosen, top_k=PREFIX)
    out, lse = _dense(q[chosen], prefix, [tails[b] for b in chosen])
    _check(q[chosen], prefix, [tails[b] for b in chosen], some, out, lse)


def test_bad_trees(rng):
    q, prefix, own = _case(rng, (3, 4, 2, 1, 16, 16))
    tree, tails = _tree(rng, own, F32)
    index = la.index.Flat(prefix)
    many, _, _ = _case(rng, (3, 4, 2, 2, 16, 16))
    other = la.kv.PrefixTree(2, 8, 16, F32, 8, capacity=1 << 10)
    for error, match, arguments, options in [
        (ValueError, "tail_indexes: got indexes", (q, prefix, index, tree, [la.index.Flat(t) for t in tails]), {}),
        (ValueError, "tail_top_k: got 5 without", (q, prefix, index, tree), {"tail_top_k": 5}),
        (ValueError, "q: got 2 queries of each", (many, prefix, index, tree), {}),
        (ValueError, "tails: got a tree of heads", (q, prefix, index, other), {}),
        (ValueError, "sequences: got 2 for 3", (q, prefix, index, tree), {"sequences": [0, 1]}),
        (ValueError, "sequence", (q, prefix, index, tree), {"sequences": [0, 1, 7]}),
        (ValueError, "sequences?: got 1 twice|twice", (q, prefix, index, tree), {"sequences": [0, 1, 1]}),
        (TypeError, "sequence", (q, prefix, index, tree), {"sequences": [0, 1, "a"]}),
        (ValueError, "sequences: got .* with tails in stores", (q, prefix, index, tails), {"sequences": [0, 1, 2]}),
    ]:
        with pytest.raises(error, match=match):
            shared_prefix_attention(*arguments, **options)
    empty = tree.add_seq([], *(np.zeros((2, 0, 16), np.float32),) * 2)
    with pytest.raises(ValueError, match=f"got number {empty} without tokens"):
        shared_prefix_attention(q, prefix, index, tree, sequences=[0, 1, empty])


def test_each_thread_count_gives_the_same_bits(rng, threads):
    q, prefix, tails = _case(np.random.default_rng(7), (5, 8, 2, 1, 32, 32))
    result = shared_prefix_attention(q, prefix, la.index.Signatures(prefix), tails, top_k=30)
    la.set_num_threads(1)
    alone = shared_prefix_attention(q, prefix, la.index.Signatures(prefix), tails, top_k=30)
    np.testing.assert_array_equal(result.out, alone.out)
    np.testing.assert_array_equal(result.lse, alone.lse)


def test_bad_inputs(rng):
    q, prefix, tails = _case(rng, (2, 4, 2, 2, 16, 16))
    index = la.index.Signatures(prefix)
    other = store_of(*rows(rng, 2, 600, 16, 16))
    call = shared_prefix_attention
    for error, match, arguments in [
        (TypeError, "prefix: got list", (q, [], index, tails)),
        (TypeError, r"tails\[1\]: got NoneType", (q, prefix, index, [tails[0], None])),
        (TypeError, "q: got dtype int64", (q.astype(np.int64), prefix, index, tails)),
        (ValueError, "q: got shape", (q[0], prefix, index, tails)),
        (ValueError, "q: got 3 heads", (q[:, :3], prefix, index, tails)),
        (ValueError, "q: got 4 heads of width 8", (q[..., :8], prefix, index, tails)),
        (ValueError, "tails: got 1 tails for 2", (q, prefix, index, tails[:1])),
        (ValueError, "tails: got 2 tails and 1 indexes", (q, prefix, index, tails, [la.index.Flat(tails[0])])),
        (ValueError, "tails: got a store twice", (q, prefix, index, [tails[0]] * 2)),
        (ValueError, "tails: got a store twice", (q, prefix, index, [tails[0], prefix])),
        (ValueError, r"tails\[1\]: got heads", (q, prefix, index, [tails[0], store_of(*rows(rng, 1, 9, 16, 16))])),
        (ValueError, r"tails\[0\]: got 1 rows", (q, prefix, index, [store_of(*rows(rng, 2, 1, 16, 16)), tails[1]])),
        (ValueError, "index: got the index of another", (q, prefix, la.index.Flat(other), tails)),
    ]:
        with pytest.raises(error, match=match):
            call(*arguments)
    for error, match, options in [
        (ValueError, "top_k", {"top_k": 0}),
        (ValueError, "tail_top_k: got 5 without", {"tail_top_k": 5}),
        (ValueError, "scale", {"scale": np.nan}),
        (ValueError, "rest", {"rest": "sampled"}),
        (ValueError, "sinks", {"sinks": -1}),
    ]:
        with pytest.raises(error, match=match):
            call(q, prefix, index, tails, **options)
    many = normal(rng, (2, 130, 2, 16))
    with pytest.raises(ValueError, match="at most 64 times"):
        call(many, prefix, index, tails)


def test_bfloat16_is_rounded_once(rng):
    """The parts are merged in float32: no rounding of each before."""
    q, prefix, tails = _case(rng, (2, 4, 2, 1, 32, 32), dtype=BF16)
    index = la.index.Flat(prefix)
    result = shared_prefix_attention(q, prefix, index, tails, top_k=PREFIX)
    wide = shared_prefix_attention(q.astype(np.float32), prefix, index, tails, top_k=PREFIX)
    np.testing.assert_array_equal(result.out, wide.out.astype(BF16))
