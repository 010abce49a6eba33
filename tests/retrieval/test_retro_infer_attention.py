"""retro_infer_attention against its oracle."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from longattn.retrieval import retro_infer_attention
from random_arrays import DTYPES, normal
from random_stores import queries, rows, store, store_of


def clusters(s, **options):
    return la.index.Clusters(
        s, **{"segment": 512, "keys_per_cluster": 16, "iterations": 10, "spherical": True, **options}
    )


@pytest.mark.parametrize("shape", [(4, 2, 1300, 32, 24), (7, 1, 733, 20, 1), (2, 2, 300, 64, 64)], ids=str)
@pytest.mark.parametrize("score", ["mean", "mean_variance"])
def test_oracle(rng, isa, threads, shape, score):
    heads, kv_heads, count, dim, value_dim = shape
    s = store(rng, kv_heads, count, dim, value_dim)
    index = clusters(s)
    q = queries(rng, heads, 2, dim=dim)
    for call in ({}, {"retrieved": 0.3, "sinks": 0, "window": 1}, {"scale": 0.2, "sink_logits": normal(rng, (heads,))}):
        result = retro_infer_attention(q, s, index, return_selected=True, **call)
        members = [index.members(h) for h in range(kv_heads)]
        expected = reference.retro_infer_attention(q, s.keys, s.values, members, **call)
        for picked, wanted in zip(result.stats.selected, expected.selected, strict=True):
            for a, b in zip(picked, wanted, strict=True):
                np.testing.assert_array_equal(a, b)
        tolerance = tolerances.attention(q, s.keys, s.values, scale=call.get("scale"))
        tolerance.check(result.out, expected.out, result.lse, expected.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_rows_are_causal_attention(rng, isa, dtype):
    s = store(rng, 2, 700, 40, dtype=dtype)
    q = queries(rng, 4, 2, dim=40, dtype=dtype)
    result = retro_infer_attention(q, s, clusters(s), retrieved=1.0)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)


def test_clusters_of_equal_keys_are_causal_attention(rng, isa):
    keys, values = rows(rng, 2, 30, 32, offset=0)[0], rows(rng, 2, 1100)[1]
    s = store_of(keys[:, rng.integers(0, 30, 1100)], values)
    q = queries(rng, 4, 2)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    result = retro_infer_attention(q, s, clusters(s, keys_per_cluster=1, spherical=False))
    tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)
    assert result.stats.fraction_attended < 0.2


def test_as_many_clusters_as_rows_are_causal_attention(rng, isa):
    s = store(rng, 2, 1100)
    q = queries(rng, 4)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    result = retro_infer_attention(q, s, clusters(s, keys_per_cluster=1))
    tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)


def test_halves_merge_to_the_whole(rng):
    s = store(rng, 2, 1300)
    q = queries(rng, 4)
    other = rows(rng, 2, 300)
    part = retro_infer_attention(q, s, clusters(s), retrieved=1.0)
    out, lse = la.merge([(part.out, part.lse), la.attention(q, *other, return_lse=True)])
    keys, values = (np.concatenate(x, axis=1) for x in ((s.keys, other[0]), (s.values, other[1])))
    whole = la.attention(q, keys, values, return_lse=True)
    tolerances.same_storage(q, keys, values).check(out, whole[0], lse, whole[1])


def test_growth(rng):
    """After new rows, which get clusters of their own, the result is the oracle's on the clusters there are."""
    s = store(rng, 1, 900)
    index = clusters(s)
    q = queries(rng, 2)
    for count in (1, 100, 700):
        s.append(*rows(rng, 1, count))
        result = retro_infer_attention(q, s, index)
        expected = reference.retro_infer_attention(q, s.keys, s.values, [index.members(0)])
        tolerances.attention(q, s.keys, s.values).check(result.out, expected.out, result.lse, expected.lse)


def test_bad_arguments(rng):
    s = store(rng)
    q = queries(rng)
    with pytest.raises(TypeError, match="index: got Pages, expected Clusters"):
        retro_infer_attention(q, s, la.index.Pages(s))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index: got clusters scored by 'radius'"):
        retro_infer_attention(q, s, clusters(s, score="radius"))
    for share in (0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="retrieved: got"):
            retro_infer_attention(q, s, clusters(s), retrieved=share)
    with pytest.raises(TypeError, match="retrieved: got '1'"):
        retro_infer_attention(q, s, clusters(s), retrieved="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="store: got NoneType, expected a KVStore"):
        retro_infer_attention(q, None, clusters(s))  # type: ignore[arg-type]
