"""Bad inputs of retrieval attention: refused by name before any work."""

import itertools
import re

import numpy as np
import pytest

import longattn as la
from random_arrays import F32, normal
from random_stores import queries, rows, store

RNG = np.random.default_rng(0)
STORE = store(RNG, 2, 600, 16, 8)
INDEX = la.index.Signatures(STORE)
HASHED = la.index.Hashes(STORE, normal(RNG, (2, 16, 32)))
OTHER = la.index.Signatures(STORE.fork())
EMPTY = la.KVStore(2, 16, 8, capacity=16)
Q = queries(RNG, 4, 3, 16)
NAN, INF = float("nan"), float("inf")

BAD = [
    ({"q": Q.tolist()}, TypeError, "q: got list"),
    ({"q": None}, TypeError, "q: got NoneType"),
    ({"q": Q.astype(np.float64)}, TypeError, "q: got dtype float64, expected float32, float16 or bfloat16"),
    ({"q": Q.astype(int)}, TypeError, "q: got dtype int64"),
    ({"q": Q[0]}, ValueError, "q: got shape (3, 16), expected [Hq, Lq, D] or [1, Hq, Lq, D]"),
    ({"q": np.stack([Q, Q])}, ValueError, "q: got shape (2, 4, 3, 16)"),
    ({"q": Q[None, None]}, ValueError, "q: got shape (1, 1, 4, 3, 16)"),
    ({"q": Q[:3]}, ValueError, "q: got 3 heads of width 16, expected a positive multiple of the 2 heads"),
    ({"q": Q[:1]}, ValueError, "q: got 1 heads"),
    ({"q": Q[:0]}, ValueError, "q: got 0 heads"),
    ({"q": Q[..., :15]}, ValueError, "q: got 4 heads of width 15"),
    ({"q": Q[..., :0]}, ValueError, "q: got 4 heads of width 0"),
    ({"q": np.ones((2 * 65, 1, 16), F32)}, ValueError, "q: got 65 query heads per KV head, expected at most 64"),
    ({"q": np.ones((2, 601, 16), F32)}, ValueError, "q: got 601 queries, expected at most the 600 rows"),
    ({"store": None}, TypeError, "store: got NoneType, expected a KVStore"),
    ({"store": STORE.keys}, TypeError, "store: got ndarray"),
    ({"store": EMPTY, "index": la.index.Signatures(EMPTY)}, ValueError, "store: got an empty store"),
    ({"store": EMPTY, "index": la.index.Signatures(EMPTY), "q": Q[:, :0]}, ValueError, "store: got an empty store"),
    ({"index": None}, TypeError, "index: got NoneType, expected an Index"),
    ({"index": STORE}, TypeError, "index: got KVStore"),
    ({"index": OTHER}, ValueError, "index: got the index of another store"),
    ({"top_k": 0}, ValueError, "top_k: got 0, expected at least 1"),
    ({"top_k": -1}, ValueError, "top_k: got -1"),
    ({"top_k": 2.0}, TypeError, "top_k: got 2.0, expected an integer"),
    ({"top_k": True}, TypeError, "top_k: got True"),
    ({"top_k": "all"}, TypeError, "top_k: got 'all'"),
    ({"top_p": 0.5}, ValueError, "top_p: got 0.5 beside top_k=7, expected one of the two"),
    ({"top_k": None, "top_p": 1.5}, ValueError, "top_p: got 1.5, expected a number between 0 and 1"),
    ({"top_k": None, "top_p": 1}, ValueError, "top_p: got 1"),
    ({"top_k": None, "top_p": 0.0}, ValueError, "top_p: got 0.0"),
    ({"top_k": None, "top_p": -0.5}, ValueError, "top_p: got -0.5"),
    ({"top_k": None, "top_p": 1e-60}, ValueError, "top_p: got"),
    ({"top_k": None, "top_p": 1 - 1e-12}, ValueError, "top_p: got"),
    ({"top_k": None, "top_p": NAN}, ValueError, "top_p: got nan"),
    ({"top_k": None, "top_p": "0.5"}, TypeError, "top_p: got '0.5', expected a number"),
    (
        {"top_k": None, "top_p": 0.5, "index": HASHED},
        ValueError,
        "top_p: got an index of hashes that estimates nothing",
    ),
    ({"rest": "values", "index": HASHED}, ValueError, "rest: got values with hashes that estimate nothing"),
    ({"rest": "value"}, ValueError, "rest: got 'value', expected 'values', 'none', 'sampled' or None"),
    ({"rest": True}, ValueError, "rest: got True"),
    ({"rest": np.ones(2)}, ValueError, "rest: got array"),
    ({"return_stats": 1}, TypeError, "return_stats: got 1, expected True or False"),
    ({"return_selected": "yes"}, TypeError, "return_selected: got 'yes', expected True or False"),
    ({"sinks": -1}, ValueError, "sinks: got -1, expected at least 0"),
    ({"sinks": 1.5}, TypeError, "sinks: got 1.5, expected an integer"),
    ({"sinks": None}, TypeError, "sinks: got None"),
    ({"window": -512}, ValueError, "window: got -512, expected at least 0"),
    ({"window": "512"}, TypeError, "window: got '512'"),
    ({"window": False}, TypeError, "window: got False"),
    ({"scale": NAN}, ValueError, "scale: got nan, expected a finite float32"),
    ({"scale": -INF}, ValueError, "scale: got -inf"),
    ({"scale": 1e39}, ValueError, "scale: got"),
    ({"scale": "1"}, TypeError, "scale: got '1', expected a number"),
    ({"scale": True}, TypeError, "scale: got True"),
    ({"sink_logits": np.ones(2, F32)}, ValueError, "sink_logits: got shape (2,), expected (4,)"),
    ({"sink_logits": np.ones((4, 1), F32)}, ValueError, "sink_logits: got shape (4, 1)"),
    ({"sink_logits": [0.0] * 4}, TypeError, "sink_logits: got list"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: re.sub(r"\s+", " ", str(x))[:60])
def test_bad_arguments(change, error, message):
    before = la.retrieval_attention(Q, STORE, INDEX, top_k=7)
    arguments = {"q": Q, "store": STORE, "index": INDEX, "top_k": 7} | change
    with pytest.raises(error, match="^" + re.escape(message)):
        la.retrieval_attention(**arguments)
    after = la.retrieval_attention(Q, STORE, INDEX, top_k=7)
    np.testing.assert_array_equal(before.out, after.out)
    assert len(STORE) == 600 and len(INDEX) == 592


@pytest.mark.parametrize("name", ["top_k", "sinks", "window"])
@pytest.mark.parametrize("count", [10**6, 2**63 - 1, 2**64 - 1, 2**70])
def test_any_count_above_the_length_reads_everything(name, count):
    result = la.retrieval_attention(Q, STORE, INDEX, **({"top_k": 7} | {name: count}))
    expected = la.attention(Q, STORE.keys, STORE.values, causal=True)
    np.testing.assert_allclose(result.out, expected, rtol=1e-4, atol=1e-5)
    assert result.stats.fraction_attended == 1


def test_unusual_but_right():
    """Numpy integers as counts, an integer scale, the default budget."""
    plain = la.retrieval_attention(Q, STORE, INDEX, top_k=7, sinks=3, window=9, scale=1.0)
    numpy = la.retrieval_attention(
        Q, STORE, INDEX, top_k=np.int32(7), sinks=np.uint8(3), window=np.int64(9), scale=np.float32(1)
    )
    np.testing.assert_array_equal(plain.out, numpy.out)
    result = la.retrieval_attention(Q, STORE, INDEX, window=32)
    assert (result.stats.keys_attended == result.stats.keys_total - result.stats.keys_scored + 64).all()


def test_a_read_only_query_and_arrays_of_the_store_itself():
    q = Q.copy()
    q.flags.writeable = False
    np.testing.assert_array_equal(
        la.retrieval_attention(q, STORE, INDEX, top_k=7).out, la.retrieval_attention(Q, STORE, INDEX, top_k=7).out
    )
    own = STORE.keys[:, -1:]
    np.testing.assert_array_equal(
        la.retrieval_attention(own, STORE, INDEX, top_k=7).out,
        la.retrieval_attention(own.copy(), STORE, INDEX, top_k=7).out,
    )


def test_an_index_keeps_its_store(rng):
    index = la.index.Signatures(store(rng, 2, 600, 16))
    result = la.retrieval_attention(queries(rng, 2, 1, 16), index.store, index, top_k=5)
    assert np.isfinite(result.out).all()
    index.store.append(*rows(rng, 2, 10, 16))
    assert len(index.store) == 610


def test_statistics_are_made_when_they_are_asked_for(rng):
    """They say what the call did, whatever became of the store since."""
    s = store(rng, 2, 700)
    index, q = la.index.Signatures(s), queries(rng, 4, 3)
    result = la.retrieval_attention(q, s, index, top_k=30, window=50, return_selected=True)
    s.truncate(600)
    stats = result.stats
    assert stats is not None and stats is result.stats
    np.testing.assert_array_equal(stats.keys_total, [[698, 699, 700]] * 2)
    assert [len(rows) for of_head in stats.selected for rows in of_head] == [30] * 6
    assert "keys_attended" in repr(result)
    assert la.retrieval_attention(q, s, index, top_k=30, return_stats=False).stats is None


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize(
    ("make", "budget"),
    [
        *itertools.product(
            [
                la.index.Signatures,
                lambda s: la.index.Signatures(s, bits=1),
                la.index.Flat,
                lambda s: la.index.ProductQuantisation(s, subvectors=4),
            ],
            [{"top_k": 9}, {"top_p": 0.8}],
        ),
        (lambda s: la.index.Pages(s, page_size=16), {"top_k": 9}),
    ],
)
def test_a_query_that_is_no_number_leaves_its_group_alone(make, budget, bad):
    """Selection is by the mean over a group: a head without weights has no say in it."""
    index = make(STORE)
    spoilt = np.repeat(Q[:2, :1], 2, axis=0)
    spoilt[1::2] = bad
    options = budget | {"sinks": 2, "window": 5, "return_selected": True}
    whole = la.retrieval_attention(Q[:2, :1], STORE, index, **options)
    found = la.retrieval_attention(spoilt, STORE, index, **options)
    np.testing.assert_allclose(found.out[::2], whole.out, rtol=1e-4, atol=1e-6)
    for (one,), (other,) in zip(found.stats.selected, whole.stats.selected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.isnan(found.out[1::2]).all()
