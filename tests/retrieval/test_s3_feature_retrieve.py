"""`s3_feature_retrieve` and its parts: features, inverted lists, BM25, fusion, spans; and the index over a store."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from longattn.retrieval import FeatureIndex, bm25, fuse, s3_feature_retrieve, sae_topk_features, select_spans
from random_arrays import DTYPES, F32, normal


def check(q, k, w_enc, **options):
    found = s3_feature_retrieve(q, k, w_enc, **options)
    spans, scores = reference.s3_feature_retrieve(q, k, w_enc, **options)
    bias = float(np.abs(options["b_enc"]).max()) if options.get("b_enc") is not None else 0.0
    layers = 1 if k.ndim == 2 else len(k)
    tolerances.check_features(found.scores, scores, q, k, w_enc, bias, layers)
    # Spans by the scores that came out: near ties may fall either way.
    own = found.scores.astype(np.float64)
    if options.get("text_scores") is not None:
        own = reference.fuse(own, options["text_scores"], options.get("fusion", "rrf"), options.get("weight", 0.5))
    sizes = (options.get("token_budget", 1024), options.get("span", 64), options.get("radius", 8))
    assert [tuple(pair) for pair in found.spans] == reference.spans_of(own, *sizes)
    assert found.keys_scored <= layers * k.shape[-2] and found.index_bytes > 0
    return found, spans


def arrays(rng, rows=90, features=60, dim=16, layers=None, dtype=F32):
    outer = () if layers is None else (layers,)
    q, k = normal(rng, (*outer, 7, dim), dtype), normal(rng, (*outer, rows, dim), dtype)
    return q, k, normal(rng, (*outer, dim, features))


@pytest.mark.parametrize("layers", [None, 1, 3])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("idf", [True, False])
def test_reference(rng, isa, layers, relu, idf):
    q, k, w_enc = arrays(rng, layers=layers)
    outer = () if layers is None else (layers,)
    b_enc, b_dec = normal(rng, (*outer, 60)), normal(rng, (*outer, 16))
    options = {"top_k": 9, "relu": relu, "idf": idf, "token_budget": 30, "span": 8, "radius": 2}
    check(q, k, w_enc, **options)
    check(q, k, w_enc, b_enc=b_enc, b_dec=b_dec, stop_share=0.4, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fusion", ["rrf", "minmax"])
def test_dtypes_and_fusion(rng, dtype, fusion):
    q, k, w_enc = arrays(rng, dtype=dtype)
    text = rng.random(90)
    options = {"top_k": 5, "token_budget": 20, "span": 4, "radius": 1, "fusion": fusion}
    check(q, k, w_enc, text_scores=text, weight=0.3, **options)


@pytest.mark.parametrize("rows", [1, 5, 31, 32, 300])
@pytest.mark.parametrize("features", [1, 7, 100])
def test_features(rng, isa, rows, features):
    """Few rows and many go different ways."""
    x, w_enc, b_enc = normal(rng, (rows, 20)), normal(rng, (20, features)), normal(rng, (features,))
    top_k = min(6, features)
    numbers, strengths = sae_topk_features(x, w_enc, b_enc=b_enc, top_k=top_k)
    exact = reference.sae_features(x, w_enc, b_enc, None, top_k, True)
    for own, activations, expected in zip(numbers, strengths, exact, strict=True):
        kept = activations != 0
        assert list(own[kept]) == sorted(expected) and not kept[len(expected) :].any()
        allowed = tolerances.SAFETY * tolerances.U * (np.linalg.norm(x, axis=1).max() * 20 + 4)
        np.testing.assert_allclose(activations[kept], [expected[f] for f in own[kept]], rtol=0, atol=allowed)


def test_any_number_of_threads(rng):
    x, w_enc = normal(rng, (3000, 16)), normal(rng, (16, 50))
    before, results = la.get_num_threads(), []
    for threads in (1, 2, 3):
        la.set_num_threads(threads)
        index = FeatureIndex(50)
        index.add(*sae_topk_features(x, w_enc, top_k=9))
        results.append(index.search(*sae_topk_features(x[:3], w_enc, top_k=9)))
    la.set_num_threads(before)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_bm25(rng):
    documents = [list(rng.integers(0, 12, rng.integers(1, 30))) for _ in range(15)]
    query = [3, 5, 3, 11, 99]
    np.testing.assert_allclose(bm25(query, documents), reference.bm25(query, documents), rtol=1e-12)
    np.testing.assert_allclose(
        bm25(query, documents, k1=0.9, b=0), reference.bm25(query, documents, 0.9, 0), rtol=1e-12
    )
    assert bm25(query, []).shape == (0,) and (bm25([], documents) == 0).all()


@pytest.mark.parametrize("fusion", ["rrf", "minmax"])
def test_fuse(rng, fusion):
    first, second = np.round(rng.standard_normal((2, 40)), 1)  # with ties
    expected = reference.fuse(first, second, fusion, 0.3)
    np.testing.assert_allclose(fuse(first, second, fusion=fusion, weight=0.3), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("budget", [0, 1, 7, 40, 99, 100, 1000])
@pytest.mark.parametrize(("span", "radius"), [(1, 0), (8, 2), (5, 30), (200, 3)])
def test_spans(rng, budget, span, radius):
    scores = np.round(rng.standard_normal(100), 1)
    spans = select_spans(scores, budget, span=span, radius=radius)
    if radius < 30:  # sums over long windows tie only up to rounding
        assert [tuple(pair) for pair in spans] == reference.spans_of(scores, budget, span, radius)
    assert (spans[:, 1] - spans[:, 0]).sum() == min(budget, 100)
    assert (spans[1:, 0] > spans[:-1, 1]).all()


# Identities


def test_all_features_and_no_weights_give_dot_products(rng, isa):
    q, k, _ = arrays(rng)
    unit = np.eye(16, dtype=np.float32)
    found = s3_feature_retrieve(q, k, unit, top_k=16, relu=False, idf=False)
    exact = q.astype(np.float64).sum(axis=0) @ k.astype(np.float64).T
    tolerances.check_features(found.scores, exact, q, k, unit)


def test_a_budget_of_everything_is_the_whole_context(rng):
    q, k, w_enc = arrays(rng)
    for budget in (90, 500):
        assert s3_feature_retrieve(q, k, w_enc, token_budget=budget).spans.tolist() == [[0, 90]]


@pytest.mark.parametrize("chunk", [1, 7, 64, 90])
def test_the_chunk_does_not_matter(rng, chunk):
    q, k, w_enc = arrays(rng)
    k, w_enc = np.round(k * 4) / 4, np.round(w_enc * 4) / 4  # sums without rounding, in whatever order
    options = {"token_budget": 20, "span": 5, "top_k": 9}
    one, other = (s3_feature_retrieve(q, k, w_enc, chunk=size, **options) for size in (4096, chunk))
    np.testing.assert_array_equal(other.scores, one.scores)
    np.testing.assert_array_equal(other.spans, one.spans)


def test_a_search_is_sparse_dot_products(rng):
    features = np.array([rng.permutation(30)[:6] for _ in range(50)])
    activations = rng.integers(0, 9, features.shape).astype(np.float32)  # whole numbers: no rounding
    index = FeatureIndex(30, idf=False)
    index.add(features[:20], activations[:20])
    index.add(features[20:], activations[20:])
    dense = np.zeros((50, 30))
    np.put_along_axis(dense, features, activations, axis=1)
    np.testing.assert_array_equal(index.search(features[:4], activations[:4]), dense @ dense[:4].sum(axis=0))
    np.testing.assert_array_equal(index.counts(), (dense > 0).sum(axis=0))
    assert len(index) == 50 and index.nbytes >= 6 * (dense > 0).sum()


# The index over a store


def filled(rng, rows=400, dtype="float32"):
    store = la.KVStore(2, 16, dtype=dtype, capacity=4096)
    store.append(normal(rng, (2, rows, 16)), normal(rng, (2, rows, 16)))
    return store


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_a_store(rng, isa, per_head, dtype):
    """Picked rows are those of the highest scores, of the group's queries."""
    store = filled(rng, dtype=dtype)
    w_enc, b_enc = normal(rng, (2, 16, 40)), normal(rng, (2, 40))
    index = la.index.Features(store, w_enc if per_head else w_enc[0], b_enc=b_enc if per_head else b_enc[0], top_k=8)
    q = normal(rng, (6, 1, 16))
    result = la.retrieval_attention(q, store, index, top_k=20, sinks=4, window=30, rest="none", return_selected=True)
    assert not index.estimates and len(index) == 400
    for h in range(2):
        w, b = w_enc[h if per_head else 0], b_enc[h if per_head else 0]
        queries = reference.sae_features(q[3 * h : 3 * h + 3, 0], w, b, None, 8, True)
        keys = reference.sae_features(np.asarray(store.keys[h], np.float64), w, b, None, 8, True)
        scores = reference.feature_scores(queries, keys, True, 1.0)
        picked = result.stats.selected[h][0]
        assert len(picked) == 20 and picked.min() >= 4 and picked.max() < 370
        others = np.setdiff1d(np.arange(4, 370), picked)
        assert scores[picked].min() >= scores[others].max() - 2e-2 * scores.max()  # activations are rounded to f16
    everything = la.retrieval_attention(q, store, index, top_k=400, rest="none")
    k, v = (np.asarray(x, np.float32) for x in (store.keys, store.values))
    expected, expected_lse = la.attention(q, k, v, causal=True, return_lse=True)
    tolerances.same_storage(q, k, v).check(everything.out, expected, everything.lse, expected_lse)


def test_it_follows_its_store(rng, tmp_path):
    """Appends, truncates, forks and files give what an index that is made anew gives."""
    store, w_enc = filled(rng), normal(rng, (16, 40))
    index = la.index.Features(store, w_enc, top_k=8, idf=False, stop_share=0.9)
    q = normal(rng, (4, 1, 16))

    def picked(some):
        result = la.retrieval_attention(q, some.store, some, top_k=15, window=10, rest="none", return_selected=True)
        return [list(rows[0]) for rows in result.stats.selected]

    picked(index)
    store.truncate(250)
    extra = normal(rng, (2, 100, 16))
    store.append(extra, extra)
    anew = la.index.Features(store, w_enc, top_k=8, idf=False, stop_share=0.9)
    assert picked(index) == picked(anew) and len(index) == 350
    index.save(tmp_path / "index")
    again = la.index.Features.load(tmp_path / "index", store)
    assert again.parameters == index.parameters and picked(again) == picked(index)
    fork = store.fork()
    fork.append(extra, extra)
    branch = index.fork(fork)
    assert len(branch) == 350 and picked(branch) == picked(
        la.index.Features(fork, w_enc, top_k=8, idf=False, stop_share=0.9)
    )


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": np.zeros((7, 15), F32)}, ValueError, r"q: got shape \(7, 15\), expected layers and width of k"),
        ({"k": np.zeros((2, 90, 16), F32)}, ValueError, r"q: got shape \(7, 16\), expected \[T, D\]"),
        ({"k": np.zeros((90, 16))}, TypeError, r"k: got dtype float64"),
        ({"w_enc": np.zeros((15, 60), F32)}, ValueError, r"w_enc: got shape"),
        ({"w_enc": np.full((16, 60), np.nan, F32)}, ValueError, r"w_enc: got NaN or infinity"),
        ({"b_enc": np.zeros(59, F32)}, ValueError, r"b_enc: got shape \(59,\), expected \(60,\)"),
        ({"b_dec": np.zeros(60, F32)}, ValueError, r"b_dec: got shape \(60,\), expected \(16,\)"),
        ({"top_k": 61}, ValueError, r"top_k: got 61, expected 1 to 60"),
        ({"stop_share": 0.0}, ValueError, r"stop_share: got 0.0"),
        ({"chunk": 0}, ValueError, r"chunk: got 0"),
        ({"radius": -1}, ValueError, r"radius: got -1"),
        ({"span": 0}, ValueError, r"span: got 0"),
        ({"token_budget": -1}, ValueError, r"token_budget: got -1"),
        ({"text_scores": np.zeros(89)}, ValueError, r"text_scores: got shape \(89,\), expected \(90,\)"),
        ({"fusion": "sum"}, ValueError, r"fusion: got 'sum', expected 'rrf' or 'minmax'"),
        ({"weight": 2.0}, ValueError, r"weight: got 2.0, expected 0 to 1"),
        ({"relu": 1}, TypeError, r"relu: got 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, w_enc = arrays(rng)
    with pytest.raises(error, match=message):
        s3_feature_retrieve(**({"q": q, "k": k, "w_enc": w_enc} | change))


def test_bad_entries(rng):
    index, ones = FeatureIndex(10), np.ones((2, 2), F32)
    for features, activations, error, message in (
        ([[0, 1]], ones, TypeError, r"features: got list"),
        (np.zeros((2, 2)), ones, TypeError, r"features: got dtype float64"),
        (np.array([[0, 10], [1, 2]]), ones, ValueError, r"features: got numbers from 0 to 10, expected 0 to 9"),
        (np.array([[0, 0], [1, 2]]), ones, ValueError, r"features: got 0 twice in a row"),
        (np.array([[0, 1], [1, 2]]), np.ones((2, 3), F32), ValueError, r"activations: got shape \(2, 3\)"),
        (np.array([[0, 1], [1, 2]]), np.full((2, 2), np.inf, F32), ValueError, r"activations: got NaN or infinity"),
        (np.array([[0, 1], [1, 2]]), np.full((2, 2), 1e6, F32), ValueError, r"activations: got 1000000"),
    ):
        with pytest.raises(error, match=message):
            index.add(features, activations)
    assert len(index) == 0
    with pytest.raises(ValueError, match=r"x: got NaN or infinity in features of row 1"):
        sae_topk_features(np.array([[1.0], [np.nan]], F32), np.ones((1, 3), F32), top_k=2)


def test_bad_indexes(rng):
    store = filled(rng)
    for change, message in (
        ({"w_enc": np.zeros((3, 16, 40), F32)}, r"w_enc: got shape"),
        ({"stop_share": 1.5}, r"stop_share"),
        ({"scale": 0.0}, r"scale"),
        ({"top_k": 41}, r"top_k: got 41, expected 1 to 40"),
    ):
        with pytest.raises(ValueError, match=message):
            la.index.Features(store, **({"w_enc": np.zeros((16, 40), F32)} | change))
    with pytest.raises(TypeError, match=r"store: got int"):
        la.index.Features(3, np.zeros((16, 40), F32))
    index = la.index.Features(store, np.ones((16, 40), F32))
    with pytest.raises(ValueError, match=r"an index of features that estimates nothing"):
        la.retrieval_attention(np.zeros((4, 1, 16), F32), store, index, top_p=0.5)
    store.append(np.full((2, 1, 16), np.nan, F32), np.zeros((2, 1, 16), F32))
    with pytest.raises(ValueError, match=r"NaN or infinity in key 400 of head 0"):
        index.update()
    assert len(index) == 400  # as it was
