"""HATA: oracle, identities, budgets; SimHash's angle."""

import re

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from random_arrays import BF16, DTYPES, normal
from random_stores import queries, rows, store, store_of

hata = la.retrieval.hata_topk_attention


def problem(rng, count=1000, dim=24, code_bits=128, *, group=2, rows_=1, dtype=BF16):
    """Integers, so that signs and norms are the same in every arithmetic, zeros and ties included."""
    keys = rng.integers(-3, 4, (2, count, dim)).astype(np.float32)
    keys[:, 100:110] = 0
    s = store_of(keys, rows(rng, 2, count, dim)[1], dtype)
    weights = rng.integers(-2, 3, (2, dim, code_bits)).astype(np.float32)
    return s, weights, rng.integers(-3, 4, (2 * group, rows_, dim)).astype(np.float32)


def check(s, weights, q, use_norm=False, *, scale=0.125, **call):
    call["scale"] = scale  # a power of 2: products of 0 stay 0
    index = la.index.Hashes(s, weights, use_norm=use_norm)
    result = hata(q, s, index, return_selected=True, **call)
    oracle = reference.hata_topk_attention(q, s.keys, s.values, weights, use_norm, len(index), **call)
    for of_head, expected in zip(result.stats.selected, oracle.selected, strict=True):
        for picked, rows_ in zip(of_head, expected, strict=True):
            np.testing.assert_array_equal(picked, rows_)
    tolerance = tolerances.attention(q, s.keys, s.values, scale=scale)
    tolerance.check(result.out, oracle.out, result.lse, oracle.lse)
    return result


@pytest.mark.parametrize("use_norm", [False, True])
@pytest.mark.parametrize(
    "shape", [(128, 4, 50), (32, 1, 7), (70, 3, 400), (5, 2, 1), (256, 9, 30), (512, 1, 3)], ids=str
)
def test_rows_of_smallest_distance(rng, isa, use_norm, shape):
    code_bits, group, top_k = shape
    s, weights, q = problem(rng, code_bits=code_bits, group=group, rows_=2)
    check(s, weights, q, use_norm, top_k=top_k, sinks=3, window=40)


@pytest.mark.parametrize("use_norm", [False, True])
@pytest.mark.parametrize("group", [31, 32, 64])
def test_large_groups(rng, group, use_norm):
    """More heads than share a table."""
    s, weights, q = problem(rng, 300, 8, 40, group=group)
    check(s, weights, q, use_norm, top_k=20, window=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    s, weights, q = problem(rng, dtype=dtype)
    check(s, weights, q.astype(dtype), top_k=30, window=16)


def test_a_share_of_the_rows(rng):
    s, weights, q = problem(rng, 1000)
    result = check(s, weights, q, top_k=0.0156, window=16)
    assert [len(p) for of_head in result.stats.selected for p in of_head] == [16, 16]


def test_a_budget_of_every_row_is_attention(rng, threads):
    s, q = store(rng, 2, 700, 24), queries(rng, 4, 3, 24)
    index = la.index.Hashes(s, la.index.random_weights(2, 24, 64))
    result = hata(q, s, index, top_k=len(s), window=16)
    oracle = reference.attention(q, s.keys, s.values, [[[]] * 3] * 2, 0)
    tolerances.attention(q, s.keys, s.values).check(result.out, oracle.out, result.lse, oracle.lse)
    assert (result.stats.missed_mass == 0).all()


def nearest(rng, keys, q, weights, top_k=1, **options):
    """The rows that a query selects among keys, sinks and window aside."""
    s = store_of(keys, np.ones((len(keys), keys.shape[1], 1), np.float32))
    index = la.index.Hashes(s, weights, **options)
    result = hata(q, s, index, top_k=top_k, sinks=0, window=0, return_selected=True)
    return [of_head[0].tolist() for of_head in result.stats.selected]


def test_a_vector_is_nearest_to_itself_and_farthest_from_its_opposite(rng):
    keys = normal(rng, (1, 640, 16))
    weights = la.index.random_weights(1, 16, 128)
    for row in (0, 77, 639):
        q = keys[:, row : row + 1]
        assert nearest(rng, keys, q, weights) == [[row]]
        # All but one row: the one that is left out is the farthest.
        keys_with_opposite = keys.copy()
        keys_with_opposite[:, 300] = -q[:, 0]
        (kept,) = nearest(rng, keys_with_opposite, q, weights, 639)
        assert np.setdiff1d(np.arange(640), kept).tolist() == [300]


@pytest.mark.parametrize("use_norm", [False, True])
def test_the_length_of_keys_counts_only_with_norms(rng, use_norm):
    keys, weights = normal(rng, (1, 640, 16)), la.index.random_weights(1, 16, 64)
    stretched = keys * rng.uniform(0.1, 9, (1, 640, 1)).astype(np.float32)
    q = queries(rng, 2, 1, 16)
    same = nearest(rng, keys, q, weights, 20, use_norm=use_norm) == nearest(
        rng, stretched, q, weights, 20, use_norm=use_norm
    )
    assert same is not use_norm


def test_the_identity_counts_signs_that_disagree(rng):
    keys, q = normal(rng, (1, 640, 48)), normal(rng, (1, 1, 48))
    disagree = ((keys[0] > 0) != (q[0] > 0)).sum(axis=-1)
    expected = np.sort(np.argsort(disagree, kind="stable")[:25])
    assert nearest(rng, keys, q, np.eye(48, dtype=np.float32)[None], 25) == [expected.tolist()]


def test_packed_codes_are_the_unpacked_bits(rng):
    """Sum over the group of {0, 1} products: as many bits differ as are 1 in exactly one of two codes."""
    s, weights, q = problem(rng, 640, 16, 77, group=3)
    result = check(s, weights, q, top_k=33, sinks=0, window=0)
    for h in range(2):
        k_bits = (s.keys[h].astype(np.float64) @ weights[h] > 0).astype(int)
        q_bits = (q[3 * h : 3 * h + 3, 0] @ weights[h] > 0).astype(int)
        distance = sum((b @ (1 - k_bits.T)) + ((1 - b) @ k_bits.T) for b in q_bits)
        np.testing.assert_array_equal(result.stats.selected[h][0], np.sort(np.argsort(distance, kind="stable")[:33]))


def test_random_weights_estimate_the_angle(rng):
    """SimHash: the share of bits that differ is the angle over pi."""
    weights = la.index.random_weights(1, 64, 512, seed=5)[0]
    x, y = normal(rng, (2, 200, 64))
    y = x + y * np.linspace(0, 3, 200, dtype=np.float32)[:, None]
    differ = ((x @ weights > 0) != (y @ weights > 0)).mean(axis=-1)
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    angle = np.arccos(np.clip(cosine, -1, 1)) / np.pi
    z = (differ - angle) / np.sqrt(np.maximum(angle * (1 - angle), 1e-9) / 512)
    assert abs(z[1:].mean()) < 4 / 199**0.5 and 0.8 < z[1:].std() < 1.2


S, W_, Q_ = problem(np.random.default_rng(0), 600)
INDEX = la.index.Hashes(S, W_)

BAD = [
    ({"index": la.index.LshTables(S, 4, 2)}, TypeError, "index: got LshTables, expected a Hashes"),
    ({"index": None}, TypeError, "index: got NoneType"),
    ({"index": la.index.Hashes(S.fork(), W_)}, ValueError, "index: got the index of another store"),
    ({"top_k": 0}, ValueError, "top_k: got 0"),
    ({"top_k": -3}, ValueError, "top_k: got -3"),
    ({"top_k": 0.0}, ValueError, "top_k: got 0.0, expected a number of rows, or a share"),
    ({"top_k": 1.5}, ValueError, "top_k: got 1.5"),
    ({"top_k": float("nan")}, ValueError, "top_k: got nan"),
    ({"top_k": "all"}, TypeError, "top_k: got 'all'"),
    ({"top_k": True}, TypeError, "top_k: got True"),
    ({"store": None}, TypeError, "store: got NoneType"),
    ({"q": Q_[:3]}, ValueError, "q: got 3 heads"),
    ({"window": -1}, ValueError, "window: got -1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: re.sub(r"\s+", " ", str(x))[:40])
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        hata(**({"q": Q_, "store": S, "index": INDEX} | change))
