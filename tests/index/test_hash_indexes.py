"""Hashes, tables and collisions as indexes: they follow their store, are copied and saved, and take odd rows."""

import re

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn import _core
from longattn.reference import retrieval as reference
from random_arrays import BF16, DTYPES, F32, normal
from random_stores import queries, rows, store_of

DIM = 24
KINDS = ("hashes", "hashes by norm", "lsh", "collisions")
each_kind = pytest.mark.parametrize("kind", KINDS)
CALL = {"top_k": 40, "window": 48, "return_selected": True}


def index_of(store, kind):
    """An index of a kind, of few bits: rows tie often."""
    weights = la.index.random_weights(store.kv_heads, store.head_dim, 40, seed=2)
    if kind == "lsh":
        return la.index.LshTables(store, 12, 3, seed=4)
    if kind == "collisions":
        return la.index.Collisions(store, seed=4, candidate_ratio=0.1)
    return la.index.Hashes(store, weights, use_norm=kind == "hashes by norm")


def balanced_rows(rng, count, spread=1.0):
    """Keys whose mean is 0 over every 64 rows, so that a mean fitted to any of them is the same; and values."""
    half = normal(rng, (2, count // 64, 32, DIM), spread=spread)
    keys = np.stack([half, -half], axis=2).reshape(2, count, DIM)
    return keys, normal(rng, (2, count, 16))


def same(a, b):
    for of_head, of_other in zip(a.stats.selected, b.stats.selected, strict=True):
        for picked, other in zip(of_head, of_other, strict=True):
            np.testing.assert_array_equal(picked, other)
    np.testing.assert_array_equal(a.out, b.out)
    np.testing.assert_array_equal(a.lse, b.lse)


def check_read_rows(q, s, index, result, **call):
    """Without weights, the output is the softmax over the rows that were read."""
    oracle = reference.attention(q, s.keys, s.values, result.stats.selected, len(index), **call)
    tolerances.attention(q, s.keys, s.values).check(result.out, oracle.out, result.lse, oracle.lse)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_appending_equals_indexing_at_once(rng, isa, kind, dtype):
    keys, values = balanced_rows(rng, 6400)
    grown, once = (store_of(keys[:, :n], values[:, :n], dtype) for n in (640, 6400))
    index = index_of(grown, kind)
    q = queries(rng, dim=DIM)
    for end in (641, 650, 704, 1000, 4800, 4801, 6400):
        grown.append(keys[:, len(grown) : end], values[:, len(grown) : end])
        result = la.retrieval_attention(q, grown, index, **CALL)
        assert len(index) == end // 64 * 64
    other = index_of(once, kind)
    same(result, la.retrieval_attention(q, once, other, **CALL))
    if kind != "lsh":
        check_read_rows(q, once, other, result, window=48)


@each_kind
def test_truncate(rng, kind):
    keys, values = balanced_rows(rng, 12_800)
    s = store_of(keys[:, :9600], values[:, :9600])
    index = index_of(s, kind)
    q = queries(rng, dim=DIM)
    cuts = ((9599, 9600), (9000, 9664), (5000, 6400), (4096, 8192), (4095, 4097), (1280, 9600), (100, 700), (0, 640))
    for keep, end in cuts:
        la.retrieval_attention(q, s, index, **CALL)
        s.truncate(keep)
        if keep:
            same(la.retrieval_attention(q, s, index, **CALL), la.retrieval_attention(q, s, index_of(s, kind), **CALL))
        s.append(keys[:, keep:end], values[:, keep:end])
        same(la.retrieval_attention(q, s, index, **CALL), la.retrieval_attention(q, s, index_of(s, kind), **CALL))


@each_kind
def test_rows_replaced_unseen_are_indexed_anew(rng, kind):
    keys, values = balanced_rows(rng, 2560)
    s = store_of(keys[:, :1280], values[:, :1280])
    index = index_of(s, kind)
    index.update()
    s.truncate(1000)
    s.append(keys[:, 1280:1560], values[:, 1280:1560])
    q = queries(rng, dim=DIM)
    s.append(keys[:, 1560:1600], values[:, 1560:1600])
    result = la.retrieval_attention(q, s, index, **CALL)
    if kind == "lsh":  # the mean is another
        assert len(index) == 1280
    else:
        same(result, la.retrieval_attention(q, s, index_of(s, kind), **CALL))


@each_kind
def test_fork(rng, kind):
    keys, values = balanced_rows(rng, 5120)
    s = store_of(keys[:, :2560], values[:, :2560])
    index = index_of(s, kind)
    index.update()
    other = s.fork()
    copy = index.fork(other)
    assert type(copy) is type(index) and copy.parameters == index.parameters and len(copy) == 2560
    other.truncate(2000)
    other.append(keys[:, 2560:3000], values[:, 2560:3000])
    other.append(keys[:, 3000:3700], values[:, 3000:3700])
    s.append(keys[:, 3840:5120], values[:, 3840:5120])
    q = queries(rng, dim=DIM)
    for store, grown in ((s, index), (other, copy)):
        result = la.retrieval_attention(q, store, grown, **CALL)
        if kind != "lsh" or store is s:
            same(result, la.retrieval_attention(q, store, index_of(store, kind), **CALL))
    with pytest.raises(ValueError, match="a fork of the indexed store"):
        index.fork(store_of(keys, values))


@each_kind
@pytest.mark.parametrize("count", [40, 1000, 6000])
def test_files(tmp_path, rng, kind, count):
    s = store_of(*rows(rng, 2, count, DIM, 16), BF16)
    index = index_of(s, kind)
    index.update()
    index.save(tmp_path / "index")
    again = type(index).load(tmp_path / "index", s)
    assert again.parameters == index.parameters and repr(again) == repr(index)
    s.append(*rows(rng, 2, 3000, DIM, 16))
    q = queries(rng, dim=DIM)
    same(la.retrieval_attention(q, s, index, **CALL), la.retrieval_attention(q, s, again, **CALL))
    with pytest.raises(ValueError, match="expected 'signatures'"):
        la.index.Signatures.load(tmp_path / "index", s)


@each_kind
def test_keys_that_are_not_finite_are_refused(rng, kind):
    keys, values = balanced_rows(rng, 1280)
    for bad in (np.nan, np.inf):
        s = store_of(keys[:, :700], values[:, :700])
        index = index_of(s, kind)
        index.update()
        spoiled = keys[:, 700:1280].copy()
        spoiled[1, 33, 5] = bad
        s.append(spoiled, values[:, 700:1280])
        q = queries(rng, dim=DIM)
        with pytest.raises(
            ValueError, match=re.escape("store: got NaN or infinity in key 733 of head 1, expected finite")
        ):
            la.retrieval_attention(q, s, index, **CALL)
        s.truncate(733)
        s.append(keys[:, 733:1280], values[:, 733:1280])
        la.retrieval_attention(q, s, index, **CALL)
        assert len(index) == 1280
        # From the first use on, too.
        s = store_of(np.concatenate([keys, spoiled], axis=1), np.concatenate([values, values[:, 700:]], axis=1))
        index = index_of(s, kind)
        with pytest.raises(ValueError, match="NaN or infinity in key 1313 of head 1"):
            index.update()
        s.truncate(1280)
        index.update()
        assert len(index) == 1280


@each_kind
@pytest.mark.parametrize("rows_", ["constant", "zero", "some zero", "equal in pairs", "tiny", "huge"])
def test_odd_keys(rng, isa, kind, rows_):
    keys, values = balanced_rows(rng, 1920)
    if rows_ == "constant":
        keys[:] = normal(rng, (2, 1, DIM))
    elif rows_ == "zero":
        keys[:] = 0
    elif rows_ == "some zero":
        keys[:, ::3] = 0
    elif rows_ == "equal in pairs":
        keys[:, 1::2] = keys[:, ::2]
    else:
        keys *= np.float32(1e-18 if rows_ == "tiny" else 1e15)
    s = store_of(keys, values)
    q = queries(rng, dim=DIM, spread=1e-12 if rows_ == "huge" else 1.5)
    q[1] = 0
    index = index_of(s, kind)
    result = la.retrieval_attention(q, s, index, **CALL)
    assert np.isfinite(result.out).all() and np.isfinite(result.lse).all()
    for picked in (p[0] for p in result.stats.selected):
        assert len(picked) <= 40 and (np.diff(picked.astype(int)) > 0).all()
        if rows_ in ("constant", "zero") and kind != "lsh":  # all tie
            np.testing.assert_array_equal(picked, np.arange(4, 44))
    if kind != "lsh":
        check_read_rows(q, s, index, result, window=48)


@each_kind
@pytest.mark.parametrize("count", [1, 3, 63, 64, 65, 130])
def test_small_stores(rng, kind, count):
    keys, values = rows(rng, 2, count, DIM, 16)
    s = store_of(keys, values)
    q = queries(rng, 4, 1, DIM)
    index = index_of(s, kind)
    result = la.retrieval_attention(q, s, index, top_k=count, sinks=0, window=0, return_selected=True)
    assert len(index) == (0 if kind == "lsh" else count // 64 * 64)
    oracle = la.attention(q[None], s.keys[None], s.values[None], return_lse=True)
    np.testing.assert_allclose(result.out, oracle[0][0], atol=1e-5)
    np.testing.assert_allclose(result.lse, oracle[1][0], atol=1e-5)
    assert (result.stats.keys_attended == count).all()


@each_kind
def test_statistics_and_bytes(rng, kind):
    s = store_of(*rows(rng, 2, 5000, DIM, 16))
    index = index_of(s, kind)
    assert len(index) == 0 and not index.estimates and index.store is s
    empty = index.nbytes
    result = la.retrieval_attention(queries(rng, dim=DIM), s, index, sinks=4, window=100, top_k=40)
    assert (result.stats.keys_total == 5000).all() and (result.stats.keys_scored == 4992 - 4 - 92).all()
    steady = 4 + 8 + 92
    assert (result.stats.keys_attended <= steady + 40).all() and (result.stats.keys_attended > steady).all()
    if kind != "lsh":
        assert (result.stats.keys_attended == steady + 40).all()
    per_row = {"hashes": 5, "hashes by norm": 7, "collisions": 3 + 16 + 4}.get(kind)
    if per_row:
        assert index.nbytes - empty == 2 * 4992 * per_row
        scanned = 4928 * {"hashes": 5, "hashes by norm": 5, "collisions": 3}[kind]
        assert (scanned <= result.stats.index_bytes).all() and (result.stats.index_bytes <= index.nbytes / 2).all()
    assert (result.stats.missed_mass == 1).all()


@each_kind
def test_any_number_of_threads(rng, kind):
    s = store_of(*rows(rng, 1, 40_000, DIM, 16))
    q = queries(rng, 3, 1, DIM)
    results = []
    before = _core.num_threads()
    for threads in (1, 2, 3):
        _core.set_num_threads(threads)
        results.append(la.retrieval_attention(q, s, index_of(s, kind), **CALL))
    _core.set_num_threads(before)
    same(results[0], results[1])
    same(results[0], results[2])


@each_kind
def test_several_queries_are_several_steps(rng, kind):
    keys, values = rows(rng, 2, 1500, DIM, 16)
    s = store_of(keys, values)
    index = index_of(s, kind)
    q = queries(rng, 4, 7, DIM)
    together = la.retrieval_attention(q, s, index, **CALL)
    assert len(index) == 1472  # whatever the step
    for i in range(7):
        s.truncate(1494 + i)
        step = la.retrieval_attention(q[:, i : i + 1], s, index, **CALL)
        for h in range(2):
            np.testing.assert_array_equal(step.stats.selected[h][0], together.stats.selected[h][i])
        np.testing.assert_array_equal(step.out[:, 0], together.out[:, i])
        s.append(keys[:, 1494 + i :], values[:, 1494 + i :])


def test_weights_that_are_not_given(rng):
    s = store_of(*rows(rng, 2, 300, 16))
    q = queries(rng, 4, 40, 16)
    made = (
        (la.index.Hashes(s, code_bits=24, seed=3), la.index.random_weights(2, 16, 24, seed=3)),
        (la.index.Hashes(s, code_bits=24, queries=q), la.index.train_hash_weights(q, s.keys, 24)),
    )
    for index, weights in made:
        same(*(la.retrieval_attention(q, s, i, **CALL) for i in (index, la.index.Hashes(s, weights))))


STORE = la.KVStore(2, 8, capacity=64)
W = np.ones((2, 8, 32), np.float32)

BAD = [
    (la.index.Hashes, {"weights": W, "store": None}, TypeError, "store: got NoneType"),
    (la.index.Hashes, {"weights": W[0]}, ValueError, "weights: got shape (8, 32), expected [2, 8, code_bits]"),
    (la.index.Hashes, {"weights": W[:1]}, ValueError, "weights: got shape (1, 8, 32)"),
    (la.index.Hashes, {"weights": W[:, :7]}, ValueError, "weights: got shape (2, 7, 32)"),
    (la.index.Hashes, {"weights": W[:, :, :0]}, ValueError, "weights: got 0 bits, expected 1 to 512"),
    (la.index.Hashes, {"weights": np.ones((2, 8, 513), F32)}, ValueError, "weights: got 513 bits"),
    (la.index.Hashes, {"weights": W * np.nan}, ValueError, "weights: got numbers that are no finite float32"),
    (la.index.Hashes, {"weights": W * np.inf}, ValueError, "weights: got numbers"),
    (la.index.Hashes, {"weights": W.astype(np.float64) * 1e300}, ValueError, "weights: got numbers"),
    (la.index.Hashes, {"weights": W.astype(int)}, TypeError, "weights: got dtype int64"),
    (la.index.Hashes, {"weights": W.tolist()}, TypeError, "weights: got list"),
    (la.index.Hashes, {"weights": W, "use_norm": 1}, TypeError, "use_norm: got 1, expected True or False"),
    (la.index.Hashes, {"weights": W, "queries": W}, ValueError, "queries: got some beside weights"),
    (la.index.Hashes, {"queries": W}, ValueError, "keys: got shape (2, 0, 8)"),
    (la.index.LshTables, {"store": STORE.keys}, TypeError, "store: got ndarray"),
    (la.index.LshTables, {"tables": 1}, ValueError, "tables: got 1, expected 2 to 255"),
    (la.index.LshTables, {"tables": 256}, ValueError, "tables: got 256"),
    (la.index.LshTables, {"tables": 2.0}, TypeError, "tables: got 2.0"),
    (la.index.LshTables, {"bits": -1}, ValueError, "bits: got -1, expected 0 to 16"),
    (la.index.LshTables, {"bits": 17}, ValueError, "bits: got 17"),
    (la.index.LshTables, {"seed": -1}, ValueError, "seed: got -1"),
    (la.index.LshTables, {"seed": 0.5}, TypeError, "seed: got 0.5"),
    (la.index.Collisions, {"store": "store"}, TypeError, "store: got str"),
    (la.index.Collisions, {"store": la.KVStore(1, 1025, 1, capacity=4)}, ValueError, "store: got head_dim 1025"),
    (la.index.Collisions, {"seed": 2**64}, ValueError, "seed: got 18446744073709551616"),
    (la.index.Collisions, {"collision_ratio": 0}, ValueError, "collision_ratio: got 0, expected above 0"),
    (la.index.Collisions, {"collision_ratio": 1.01}, ValueError, "collision_ratio: got 1.01"),
    (la.index.Collisions, {"candidate_ratio": float("nan")}, ValueError, "candidate_ratio: got nan"),
    (la.index.Collisions, {"candidate_ratio": "all"}, TypeError, "candidate_ratio: got 'all', expected a number"),
    (la.index.random_weights, {"kv_heads": 0, "head_dim": 4}, ValueError, "kv_heads: got 0, expected at least 1"),
    (la.index.random_weights, {"kv_heads": 1, "head_dim": 4, "code_bits": 513}, ValueError, "code_bits: got 513"),
]


def _name(x):
    # The same in every process: what a function prints as has its address.
    return re.sub(r"\s+", " ", getattr(x, "__name__", str(x)))[:40]


@pytest.mark.parametrize(("make", "change", "error", "message"), BAD, ids=_name)
def test_bad_arguments(make, change, error, message):
    arguments = ({} if make is la.index.random_weights else {"store": STORE}) | change
    with pytest.raises(error, match=re.escape(message)):
        make(**arguments)


@each_kind
def test_nothing_is_estimated(rng, kind):
    s = store_of(*rows(rng, 2, 700, DIM, 16))
    index, q = index_of(s, kind), queries(rng, dim=DIM)
    for change, message in (
        ({"top_k": None, "top_p": 0.5}, "top_p: got an index of"),
        ({"rest": "values"}, "rest: got values with"),
    ):
        with pytest.raises(ValueError, match=message):
            la.retrieval_attention(q, s, index, **(CALL | change))
