"""pqcache_attention against its oracle."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from longattn.retrieval import pqcache_attention
from random_arrays import DTYPES, normal
from random_stores import queries, rows, store, store_of
from saved_codes import product_codes


@pytest.mark.parametrize("shape", [(4, 2, 1300, 32, 24), (7, 1, 733, 20, 1)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_oracle(rng, isa, threads, shape, bits, tmp_path):
    heads, kv_heads, count, dim, value_dim = shape
    s = store(rng, kv_heads, count, dim, value_dim)
    index = la.index.ProductQuantisation(s, 4, bits)
    index.update()
    codes = product_codes(index, tmp_path / "index")
    q = queries(rng, heads, 2, dim=dim)
    for call in ({}, {"retrieved": 0.02, "sinks": 0, "window": 1}, {"scale": 0.2}):
        result = pqcache_attention(q, s, index, return_selected=True, **call)
        expected = reference.pqcache_attention(q, s.keys, s.values, codes, **call)
        for picked, wanted in zip(result.stats.selected, expected.selected, strict=True):
            for a, b in zip(picked, wanted, strict=True):
                # Scores that are as good as equal may change places.
                assert len(a) == len(b) and len(np.setdiff1d(a, b)) <= 1 + len(b) // 30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_rows_are_causal_attention(rng, isa, dtype):
    s = store(rng, 2, 700, 40, dtype=dtype)
    q = queries(rng, 4, 2, dim=40, dtype=dtype)
    result = pqcache_attention(q, s, la.index.ProductQuantisation(s), retrieved=1.0)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)


def test_products_of_centroids_are_exact_top_k(rng, isa):
    books = normal(rng, (4, 5, 6), spread=2.0)
    keys = np.concatenate([books[j, rng.integers(0, 5, 1200)] for j in range(4)], axis=1)[None]
    s = store_of(keys, rows(rng, 1, 1200)[1])
    q = queries(rng, 1, dim=24)
    index = la.index.ProductQuantisation(s, 4, 8)
    result = pqcache_attention(q, s, index, return_selected=True)
    logits = keys[0] @ q[0, 0]
    among = reference.candidates(1200, len(index), 4, 64)
    assert (logits[result.stats.selected[0][0]] >= np.sort(logits[among])[-120] - 1e-3).all()


def test_rows_read_are_exact(rng, isa):
    s = store(rng, 2, 1300, 48)
    index = la.index.ProductQuantisation(s)
    q = queries(rng, 6, 2, dim=48)
    result = pqcache_attention(q, s, index, return_selected=True)
    exact = reference.attention(q, s.keys, s.values, result.stats.selected, len(index), window=64)
    tolerances.attention(q, s.keys, s.values).check(result.out, exact.out, result.lse, exact.lse)
    assert (result.stats.keys_attended == 68 + 130 + np.array([[0, 0]])).all()


def test_queries_read_what_steps_read(rng, isa):
    s = store(rng, 1, 1300, 32)
    index = la.index.ProductQuantisation(s)
    q = queries(rng, 2, 5)
    whole = pqcache_attention(q, s, index, retrieved=0.05, return_selected=True)
    for i in range(5):
        fork = s.fork()
        fork.truncate(1296 + i)
        step = la.retrieval_attention(
            q[:, i : i + 1], fork, index.fork(fork), top_k=65, window=64, rest="none", return_selected=True
        )
        np.testing.assert_array_equal(step.stats.selected[0][0], whole.stats.selected[0][i])
        np.testing.assert_array_equal(step.out[:, 0], whole.out[:, i])


def test_bad_arguments(rng):
    s = store(rng)
    q = queries(rng)
    with pytest.raises(TypeError, match="index: got Pages, expected ProductQuantisation"):
        pqcache_attention(q, s, la.index.Pages(s))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="retrieved: got 0"):
        pqcache_attention(q, s, la.index.ProductQuantisation(s), retrieved=0)
    with pytest.raises(TypeError, match="store: got NoneType, expected a KVStore"):
        pqcache_attention(q, None, la.index.ProductQuantisation(s))  # type: ignore[arg-type]
