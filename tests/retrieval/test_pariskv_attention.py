"""ParisKV: votes and ranks against the oracle, identities, growth into another distribution."""

import re

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from longattn.vectors import synthetic
from random_arrays import DTYPES, F32, normal
from random_stores import queries, rows, store, store_of

pariskv = la.retrieval.pariskv_attention


def check(s, q, seed=0, ratios=(None, None), **call):
    index = la.index.Collisions(s, seed=seed, collision_ratio=ratios[0], candidate_ratio=ratios[1])
    result = pariskv(q, s, index, return_selected=True, **call)
    oracle = reference.pariskv_attention(q, s.keys, s.values, seed, *ratios, len(index), **call)
    for of_head, expected in zip(result.stats.selected, oracle.selected, strict=True):
        for picked, rows_ in zip(of_head, expected, strict=True):
            # Keys a rounding apart at the cut may change places.
            assert len(picked) == len(rows_) and len(np.setdiff1d(picked, rows_)) <= len(rows_) // 50
    exact = reference.attention(
        q, s.keys, s.values, result.stats.selected, len(index), **{k: v for k, v in call.items() if k != "top_k"}
    )
    tolerance = tolerances.attention(q, s.keys, s.values, scale=call.get("scale"))
    tolerance.check(result.out, exact.out, result.lse, exact.lse)
    return result, oracle


@pytest.mark.parametrize("ratios", [(None, None), (0.1, 0.05), (1.0, 0.3)], ids=str)
@pytest.mark.parametrize("shape", [(64, 4, 50), (20, 1, 7), (128, 3, 100), (8, 5, 30), (3, 2, 10)], ids=str)
def test_rows_selected(rng, isa, shape, ratios):
    dim, group, top_k = shape
    s = store(rng, 2, 1000, dim, 12)
    check(s, queries(rng, 2 * group, 2, dim), 5, ratios, top_k=top_k, sinks=3, window=40)


@pytest.mark.parametrize("ratio", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("dim", [8, 12, 128, 200])
def test_votes_alone(rng, isa, dim, ratio):
    """As few candidates as are asked for are not ranked again: the rows are those of most votes, ties to the lower."""
    s = store(rng, 1, 1280, dim, 4)
    q = queries(rng, 3, 1, dim)
    result, oracle = check(s, q, 1, (ratio, 0.01), top_k=60, sinks=2, window=30)
    np.testing.assert_array_equal(result.stats.selected[0][0], oracle.selected[0][0])


def test_every_key_a_candidate_leaves_it_to_the_codes(rng, isa):
    s = store(rng, 1, 1280, 64, 4)
    q = queries(rng, 1, 1, 64)
    results = [check(s, q, 1, (ratio, 1.0), top_k=40, window=30)[0] for ratio in (0.01, 0.5)]
    np.testing.assert_array_equal(results[0].out, results[1].out)
    estimates = reference.estimate(q[0, 0], reference.encode(s.keys[0], 4, 1, centred=False))[4:1250]
    best = 4 + np.argsort(-estimates)[:40]
    assert len(np.setdiff1d(best, results[0].stats.selected[0][0])) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    s = store(rng, 2, 700, 32, dtype=dtype)
    check(s, queries(rng, 4, 1, 32, dtype=dtype), top_k=40, window=16)


def test_ratios_go_by_the_number_of_keys(rng):
    for count in (4900, 9000, 20_000, 40_000):
        s = store(rng, 1, count, 8, 2)
        index, q = la.index.Collisions(s), queries(rng, 1, 1, 8)
        among = count // 64 * 64 - 64
        result = pariskv(q, s, index, sinks=0, window=64 + count % 64, top_k=10)
        candidates = -(-int(among * reference.ratios(among)[1] * 1000) // 1000)
        blocks = -(-among // 64) * 64
        assert abs(int(result.stats.index_bytes[0, 0]) - blocks - candidates * (16 + 4)) <= 20


def test_a_budget_of_every_row_is_attention(rng, threads):
    s, q = store(rng, 2, 700, 24), queries(rng, 4, 3, 24)
    result = pariskv(q, s, la.index.Collisions(s), top_k=700, window=16)
    oracle = reference.attention(q, s.keys, s.values, [[[]] * 3] * 2, 0)
    tolerances.attention(q, s.keys, s.values).check(result.out, oracle.out, result.lse, oracle.lse)
    assert (result.stats.missed_mass == 0).all()


def picked(s, q, **options):
    result = pariskv(q, s, la.index.Collisions(s, seed=3), top_k=30, window=16, return_selected=True, **options)
    return [of_head[0].tolist() for of_head in result.stats.selected]


def test_a_group_of_equal_queries_selects_what_one_does(rng):
    s, q = store(rng, 2, 900, 32), queries(rng, 2, 1, 32)
    assert picked(s, np.repeat(q, 4, axis=0)) == picked(s, q)


def test_the_length_of_queries_does_not_matter(rng):
    s, q = store(rng, 2, 900, 32), queries(rng, 4, 1, 32)
    assert picked(s, q) == picked(s, np.float32(16) * q)


def test_opposite_keys_swap_with_opposite_queries(rng):
    """Keys in pairs of opposites fill opposite centroids alike."""
    half = normal(rng, (1, 640, 32))
    keys = np.stack([half, -half], axis=2).reshape(1, 1280, 32)
    s = store_of(keys, normal(rng, (1, 1280, 4)))
    q = queries(rng, 1, 1, 32)
    index = la.index.Collisions(s, candidate_ratio=0.001)
    there, back = (
        pariskv(x, s, index, top_k=80, sinks=0, window=0, return_selected=True).stats.selected[0][0] for x in (q, -q)
    )
    votes = reference.votes(q[0, 0], reference.patterns(keys[0], 0), 0.5, 0)
    last = np.sort(votes)[-80]
    # Beyond the ties at the cut.
    sure = there[votes[there] > last]
    assert len(sure) > 20
    assert np.isin(sure ^ 1, back).all()


def test_it_finds_what_matters(rng):
    """On keys that are hard for an index, most of what the best rows hold; no less where later keys differ in kind.

    One list for the mean query of a group costs some of it: a head may look for other rows than its neighbours.
    """
    keys, values, q, _ = synthetic.head("synthetic-sharp", 1, 8192, 24, 0)
    found = []
    for drift in (0, 2):
        keys[4096:] += drift * normal(rng, (128,))
        s = la.KVStore(1, 128, dtype="bfloat16", capacity=8192)
        index = la.index.Collisions(s)
        for start in range(0, 8192, 2048):
            s.append(keys[None, start : start + 2048], values[None, start : start + 2048])
            index.update()
        shares = []
        for of_group in q:
            x = of_group[:, None].astype(F32)
            result = pariskv(x, s, index, top_k=160, window=64, return_selected=True)
            logits = x[:, 0] @ np.asarray(s.keys[0], np.float32).T * 128**-0.5
            logits[:, :4], logits[:, -64:] = -np.inf, -np.inf
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            weights = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=0)
            shares.append(weights[result.stats.selected[0][0]].sum() / np.sort(weights)[-160:].sum())
        found.append(float(np.mean(shares)))
    assert found[0] > 0.75 and found[1] > found[0] - 0.05, found


S, Q_ = store(np.random.default_rng(0), 2, 600, 16), queries(np.random.default_rng(1), 4, 1, 16)
INDEX = la.index.Collisions(S)

BAD = [
    ({"index": la.index.LshTables(S)}, TypeError, "index: got LshTables, expected a Collisions"),
    ({"index": la.index.Collisions(S.fork())}, ValueError, "index: got the index of another store"),
    ({"top_k": 0}, ValueError, "top_k: got 0, expected at least 1"),
    ({"top_k": 0.5}, TypeError, "top_k: got 0.5"),
    ({"store": None}, TypeError, "store: got NoneType"),
    ({"q": Q_[:3]}, ValueError, "q: got 3 heads"),
    ({"scale": float("nan")}, ValueError, "scale: got nan"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: re.sub(r"\s+", " ", str(x))[:40])
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pariskv(**({"q": Q_, "store": S, "index": INDEX} | change))


def test_layouts_and_leading_axis(rng):
    keys, values = rows(rng, 2, 700, 32)
    s = store_of(keys, values)
    index, q = la.index.Collisions(s), queries(rng, 4, 1, 32)
    plain = pariskv(q, s, index).out
    np.testing.assert_array_equal(pariskv(q[None], s, index).out[0], plain)
    np.testing.assert_array_equal(pariskv(np.asfortranarray(q), s, index).out, plain)
