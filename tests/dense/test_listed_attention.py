"""Attention over listed rows is attention over a copy of them."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn import _core
from longattn.dense import listed_attention
from longattn.reference.dense import attention
from random_arrays import DTYPES, F32, LAYOUTS, normal, qkv


def expected(q, k, v, lists, **options):
    batch, kv_heads = k.shape[:2]
    group = q.shape[1] // kv_heads
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.full(q.shape[:-1], -np.inf)
    sinks = options.pop("sinks", None)
    for b in range(batch):
        for h in range(kv_heads):
            rows, mine = lists[b * kv_heads + h], slice(h * group, (h + 1) * group)
            own = {} if sinks is None else {"sinks": sinks[mine]}
            one = attention(q[b, mine], k[b][h : h + 1, rows], v[b][h : h + 1, rows], return_lse=True, **own, **options)
            out[b, mine], lse[b, mine] = one
    return out, lse


def check(q, k, v, rows, lists, **options):
    out, lse = listed_attention(q, k, v, rows, return_lse=True, **options)
    tolerance = tolerances.attention(q, k, v, scale=options.get("scale"), offset=3)
    other, other_lse = expected(q, k, v, lists, **options)
    tolerance.check(out, other, lse, other_lse)


@pytest.mark.parametrize(("heads", "kv_heads", "rows"), [(4, 2, 1), (6, 1, 3), (20, 2, 2), (3, 3, 1)])
@pytest.mark.parametrize("count", [0, 1, 17, 128, 129])
def test_lists_of_their_own(rng, isa, *, count, heads, kv_heads, rows):
    q, k, v = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=150, dim=20, value_dim=12)
    lists = [rng.permutation(150)[: max(count - i, 0)] for i in range(2 * kv_heads)]
    check(q, k, v, lists, lists)


def test_one_list_for_all(rng):
    q, k, v = qkv(rng, batch=2)
    rows = np.array([1, 30, 2, 36])
    check(q, k, v, rows, [rows] * 4)
    check(q, k, v, rows.tolist(), [rows] * 4)
    check(q, k, v, np.stack([rows, rows + 0]), [rows] * 4)
    check(q, k, v, np.broadcast_to(rows, (2, 2, 4)), [rows] * 4)


def test_all_rows_are_dense(rng):
    q, k, v = qkv(rng)
    out = listed_attention(q, k, v, np.arange(37))
    tolerances.attention(q, k, v).check(out, attention(q, k, v))


def test_options(rng, isa):
    q, k, v = qkv(rng)
    rows = np.array([4, 5, 20])
    sinks = normal(rng, (4,))
    check(q, k, v, rows, [rows] * 2, scale=0.5, softcap=2.0, sinks=sinks)
    out = np.empty_like(q)
    assert listed_attention(q, k, v, rows, out=out) is out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(rng, dtype, layout):
    q, k, v = qkv(rng, q_dtype=dtype, layout=layout)
    rows = np.array([0, 9, 36, 11])
    check(q, k, v, rows, [rows] * 2)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_codes(rng, dtype):
    q, k, v = (x[0] for x in qkv(rng, dim=32))
    store = la.KVStore(2, 32, dtype=dtype, capacity=64)
    store.append(k, v)
    rows = np.array([0, 9, 36, 11])
    out = listed_attention(q, store.keys, store.values, rows)
    decoded = [np.asarray(x) for x in (store.keys, store.values)]
    tolerances.attention(q, *decoded).check(out, expected(q[None], *(x[None] for x in decoded), [rows] * 2)[0][0])


def test_threads_do_not_matter(rng):
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=1, keys=9000)
    rows = rng.permutation(9000)[:8000]
    results = []
    for threads in (1, 2):
        _core.set_num_threads(threads)
        results.append(listed_attention(q, k, v, rows))
    _core.set_num_threads(1)
    np.testing.assert_array_equal(*results)
    check(q, k, v, rows, [rows])


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 37], ValueError, "rows: got numbers from 0 to 37, expected 0 to 36"),
        ([-1], ValueError, "rows: got numbers from -1 to -1"),
        (np.ones(3), TypeError, "rows: got dtype float64, expected integers"),
        (np.ones((3, 2), int), ValueError, r"rows: got shape \(3, 2\)"),
        ([[0], [1], [2]], ValueError, "rows: got 3 lists, expected 2"),
        (np.int64(3), TypeError, "rows: got numpy.int64"),
    ],
)
def test_bad_rows(rng, rows, error, message):
    q, k, v = qkv(rng)
    with pytest.raises(error, match=message):
        listed_attention(q, k, v, rows)


def test_bad_shapes(rng):
    q, k, v = qkv(rng)
    with pytest.raises(ValueError, match="v: got length 36, expected 37"):
        listed_attention(q, k, v[:, :, 1:], [0])
    with pytest.raises(TypeError, match="q: got dtype float64"):
        listed_attention(q.astype(float), k, v, [0])
    assert listed_attention(q[:, :, :0], k, v, [0]).dtype == F32
