"""`burst_attention` and its gradients: a sequence over a ring of workers."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.distributed import (
    burst_attention,
    burst_attention_backward,
    shard_attention,
    shard_attention_backward,
    shard_rows,
)
from longattn.distributed._workers import Exchange, run_workers
from longattn.reference import dense
from longattn.reference import distributed as reference
from random_arrays import DTYPES, F32, LAYOUTS, normal, qkv

SHARDS = pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def check(q, k, v, **options):
    out, lse = burst_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.burst_attention(q, k, v, return_lse=True, **options)
    tolerances.attention(q, k, v, scale=options.get("scale")).check(out, expected, lse, expected_lse)


@SHARDS
@CAUSAL
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 6, 30, 37])
def test_reference(rng, layout, causal, workers, length):
    """Also lengths that do not divide, and workers without rows."""
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=length, keys=length, value_dim=12)
    check(q, k, v, workers=workers, layout=layout, causal=causal)


@SHARDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, layout, dtype):
    q, k, v = qkv(rng, heads=6, kv_heads=2, rows=50, keys=50, dim=32, q_dtype=dtype)
    check(q, k, v, workers=3, layout=layout, causal=True, scale=0.4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(rng, layout):
    check(*qkv(rng, rows=40, keys=40, layout=layout), workers=3, causal=True)


def test_rank_3_and_torch(rng):
    q, k, v = (x[0] for x in qkv(rng, rows=40, keys=40))
    out, lse = burst_attention(q, k, v, workers=3, return_lse=True)
    assert lse.shape == (4, 40)
    torch = pytest.importorskip("torch")
    tensor = burst_attention(*(torch.from_numpy(x) for x in (q, k, v)), workers=3)
    np.testing.assert_array_equal(tensor.numpy(), out)


@SHARDS
def test_shards_hold_every_row_once(layout):
    for length in (0, 1, 7, 24):
        for workers in (1, 2, 5):
            shards = shard_rows(length, workers, layout)
            held = [list(np.concatenate([[], *map(list, mine)]).astype(int)) for mine in shards]
            assert sorted(row for mine in held for row in mine) == list(range(length))
            assert [list(x) for x in reference.positions(length, workers, layout)] == held


def test_the_same_bits_in_every_run(rng):
    q, k, v = qkv(rng, rows=90, keys=90)
    before, results = la.get_num_threads(), []
    for threads in (1, 2, 3):
        la.set_num_threads(threads)
        out, lse = burst_attention(q, k, v, workers=4, causal=True, return_lse=True)
        results.append((out, *burst_attention_backward(out, q, k, v, out, lse, workers=4, causal=True)))
    la.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(x, y)


# Identities


@CAUSAL
def test_workers_and_layout_do_not_matter(rng, isa, causal):
    q, k, v = qkv(rng, rows=64, keys=64)
    whole, whole_lse = la.attention(q, k, v, causal=causal, return_lse=True)
    tolerance = tolerances.same_storage(q, k, v)
    one = burst_attention(q, k, v, workers=1, layout="contiguous", causal=causal)
    np.testing.assert_array_equal(one, whole)
    for layout in ("contiguous", "zigzag", "striped"):
        for workers in (2, 4, 7):
            options = {"workers": workers, "layout": layout, "causal": causal}
            out, lse = burst_attention(q, k, v, return_lse=True, **options)
            tolerance.check(out, whole, lse, whole_lse)


@SHARDS
@CAUSAL
@pytest.mark.parametrize("travel", ["queries", "keys"])
@pytest.mark.parametrize(("workers", "nodes"), [(1, 1), (3, 1), (4, 2)])
def test_gradients_are_those_of_attention(rng, layout, causal, travel, workers, nodes):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=33, keys=33, value_dim=12)
    options = {"workers": workers, "layout": layout, "causal": causal, "nodes": nodes}
    out, lse = burst_attention(q, k, v, return_lse=True, **options)
    d_out = normal(rng, out.shape)
    gradients = burst_attention_backward(d_out, q, k, v, out, lse, travel=travel, **options)
    expected, expected_lse = dense.attention(q, k, v, causal=causal, return_lse=True)
    exact = dense.attention_backward(d_out, q, k, v, expected, expected_lse, causal=causal)
    weights = dense.attention_weights(q, k, range(33), causal=causal)
    tolerances.attention_backward(q, k, v, d_out, weights=weights).check(gradients, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_in_other_dtypes(rng, isa, dtype):
    q, k, v = qkv(rng, rows=40, keys=40, q_dtype=dtype)
    out, lse = la.attention(q, k, v, causal=True, return_lse=True)
    d_out = normal(rng, out.shape, dtype)
    gradients = burst_attention_backward(d_out, q, k, v, out, lse, workers=3, causal=True)
    assert [x.dtype for x in gradients] == [dtype] * 3
    exact = dense.attention_backward(d_out, q, k, v, out, lse, causal=True)
    weights = dense.attention_weights(q, k, range(40), causal=True)
    tolerances.attention_backward(q, k, v, d_out, weights=weights).check(gradients, exact)


@SHARDS
@CAUSAL
def test_parts_merge_in_one_call(rng, layout, causal):
    q, k, v = (x[0] for x in qkv(rng, rows=50, keys=50))
    shards, of = shard_rows(50, 4, layout), reference.positions(50, 4, layout)
    whole, whole_lse = la.attention(q, k, v, causal=causal, return_lse=True)
    for mine, rows in zip(shards, of, strict=True):
        parts = [
            shard_attention(q[:, rows], k[:, there], v[:, there], mine, keys, causal=causal)
            for keys, there in zip(shards, of, strict=True)
        ]
        out, lse = la.merge(parts)
        tolerances.same_storage(q, k, v).check(out, whole[:, rows], lse, whole_lse[:, rows])


@pytest.mark.parametrize(("workers", "nodes"), [(4, 2), (6, 2), (6, 3), (5, 5)])
@CAUSAL
def test_a_ring_of_nodes_gives_what_one_ring_gives(rng, workers, nodes, causal):
    q, k, v = qkv(rng, rows=60, keys=60)
    options = {"workers": workers, "causal": causal}
    one, stats = burst_attention(q, k, v, return_stats=True, **options)
    two, more = burst_attention(q, k, v, nodes=nodes, return_stats=True, **options)
    tolerances.same_storage(q, k, v).check(two, one)
    assert stats.sent.sum() == more.sent.sum()


# Traffic


def test_bytes_sent(rng):
    """As the formulas say, for shards of equal length."""
    workers, n, dim, wide = 4, 10, 16, 12
    q, k, v = qkv(rng, heads=4, kv_heads=4, rows=workers * n, keys=workers * n, dim=dim, value_dim=wide)
    out, lse, stats = burst_attention(q, k, v, workers=workers, return_lse=True, return_stats=True)
    assert stats.rounds == workers and stats.travel == "keys"
    np.testing.assert_array_equal(stats.sent, 4 * 4 * (workers - 1) * n * (dim + wide))
    arguments = (out, q, k, v, out, lse)
    *_, stats = burst_attention_backward(*arguments, workers=workers, return_stats=True)
    assert stats.travel == "queries"
    np.testing.assert_array_equal(stats.sent, 4 * 4 * (workers - 1) * n * (2 * dim + wide + 2))
    *_, stats = burst_attention_backward(*arguments, workers=workers, travel="keys", return_stats=True)
    np.testing.assert_array_equal(stats.sent, 4 * 4 * (workers - 1) * n * 2 * (dim + wide))


def test_shared_kv_heads_travel(rng):
    q, k, v = qkv(rng, heads=8, kv_heads=1, rows=40, keys=40)
    out, lse = burst_attention(q, k, v, return_lse=True)
    *_, stats = burst_attention_backward(out, q, k, v, out, lse, return_stats=True)
    assert stats.travel == "keys"


def test_a_failing_worker_fails_the_call():
    exchange = Exchange(3)

    def work(me):
        if me == 1:
            raise ValueError("worker 1")
        return exchange.receive(me, "never")

    with pytest.raises(ValueError, match=r"worker 1"):
        run_workers(exchange, work)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"workers": 0}, ValueError, r"workers: got 0"),
        ({"workers": 10**6}, ValueError, r"workers: got 1000000, expected 1 to 1024"),
        ({"workers": 2.0}, TypeError, r"workers: got 2.0"),
        ({"nodes": 3}, ValueError, r"nodes: got 3, expected a divisor of the 4 workers"),
        ({"layout": "blocked"}, ValueError, r"layout: got 'blocked', expected 'contiguous', 'zigzag' or 'striped'"),
        ({"causal": 1}, TypeError, r"causal: got 1"),
        ({"q": np.zeros((1, 4, 29, 16), F32)}, ValueError, r"k: got length 30, expected 29 as in q"),
        ({"q": np.zeros((1, 4, 30, 16))}, TypeError, r"q: got dtype float64"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=30, keys=30)
    with pytest.raises(error, match=message):
        burst_attention(**({"q": q, "k": k, "v": v} | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": np.zeros((1, 4, 30, 8), F32)}, ValueError, r"out: got shape \(1, 4, 30, 8\)"),
        ({"d_out": np.zeros((1, 4, 30, 16))}, TypeError, r"d_out: got dtype float64, expected float32 as q"),
        ({"lse": np.zeros((4, 30), F32)}, ValueError, r"lse: got shape \(4, 30\)"),
        ({"travel": "values"}, ValueError, r"travel: got 'values'"),
    ],
)
def test_bad_backward_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=30, keys=30)
    arguments = {"d_out": q, "q": q, "k": k, "v": v, "out": q, "lse": np.zeros((1, 4, 30), F32)}
    with pytest.raises(error, match=message):
        burst_attention_backward(**(arguments | change))


def test_bad_rows(rng):
    q, k, v = (x[0] for x in qkv(rng, rows=6, keys=6))
    with pytest.raises(TypeError, match=r"q_rows: got 6, expected a sequence of ranges"):
        shard_attention(q, k, v, 6, [range(6)])
    with pytest.raises(ValueError, match=r"k_rows: got 5 positions, expected 6"):
        shard_attention(q, k, v, [range(6)], [range(5)])
    with pytest.raises(ValueError, match=r"k_rows: got step 2, expected 1 as in q_rows"):
        shard_attention(q, k, v, [range(6)], [range(0, 12, 2)], causal=True)
    with pytest.raises(ValueError, match=r"q_rows: .* expected ranges that rise"):
        shard_attention(q, k, v, [range(5, -1, -1)], [range(6)])
    with pytest.raises(ValueError, match=r"delta: got shape \(6,\), expected \(4, 6\)"):
        shard_attention_backward(q, q, k, v, np.zeros(6, F32), np.zeros((4, 6), F32), [range(6)], [range(6)])
