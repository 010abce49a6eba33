"""Indexes beside faiss, hnswlib and usearch: the same rows where both are exact, elsewhere no fewer of the best rows.

Each library is asked for what a user of it would ask: the rows of largest product with one query. Ours are asked by
attention of one query head without sinks and window, so that every row is a candidate.
"""

import numpy as np
import pytest

import longattn as la
from random_arrays import F32
from random_stores import store_of

ROWS, DIM, K = 4096, 32, 50
#: How much of its recall an index of ours may be below the other's: both are means over `QUERIES` queries.
MARGIN = 0.03
QUERIES = 40


@pytest.fixture(scope="module")
def head():
    """Keys of few directions around a mean, of different norms, values, and queries that lie elsewhere."""
    rng = np.random.default_rng(31)
    basis = rng.standard_normal((12, DIM))
    keys = rng.standard_normal((ROWS, 12)) @ basis + 0.5 * rng.standard_normal((ROWS, DIM)) + rng.standard_normal(DIM)
    keys *= rng.lognormal(sigma=0.2, size=(ROWS, 1))
    asked = rng.standard_normal((2 * QUERIES, 12)) @ basis + rng.standard_normal((2 * QUERIES, DIM)) - 1
    values = rng.standard_normal((1, ROWS, 4))
    return keys.astype(F32), values.astype(F32), asked[:QUERIES].astype(F32), asked[QUERIES:].astype(F32)


@pytest.fixture(scope="module")
def store(head):
    """A store of these keys."""
    keys, values, _, _ = head
    return store_of(keys[None], values)


@pytest.fixture
def faiss():
    """The library, on one thread."""
    return _faiss()


def _faiss():
    library = pytest.importorskip("faiss", minversion="1.15")  # RaBitQ of several bits
    library.omp_set_num_threads(1)
    return library


def picked(store, index, q, top_k=K):
    """Rows that an index picks for queries `[n, D]`, one list each."""
    call = {"sinks": 0, "window": 0, "rest": "none", "return_selected": True}
    results = (la.retrieval_attention(row[None, None], store, index, top_k=top_k, **call) for row in q)
    return [result.stats.selected[0][0] for result in results]


def best_rows(keys, q):
    """The `K` rows of largest product for each query, by float64."""
    return np.argsort(-(q.astype(float) @ keys.T.astype(float)), axis=1, kind="stable")[:, :K]


def recall(found, best):
    """Mean share of the best rows that were found; -1 stands for none."""
    return float(np.mean([np.isin(of_best, of_found).mean() for of_found, of_best in zip(found, best, strict=True)]))


def check_no_worse(ours, theirs, least):
    """`least` is a recall below which an index would be of no use here, so that both cannot fail together."""
    assert ours >= theirs - MARGIN and ours >= least, (ours, theirs)


def test_flat_picks_what_faiss_flat_finds(head, store, faiss):
    keys, _, q, _ = head
    index = faiss.IndexFlatIP(DIM)
    index.add(keys)
    products, found = index.search(q, K + 1)
    for row, of_ours, of_theirs, scores in zip(q, picked(store, la.index.Flat(store), q), found, products, strict=True):
        # Ties: rows whose product is the last one's, up to rounding, may stand for each other.
        tie = 1e-5 * np.abs(scores).max()
        certain = of_theirs[:K][scores[:K] > scores[K] + tie]
        assert len(of_ours) == K and np.isin(certain, of_ours).all()
        assert (keys[of_ours] @ row >= scores[K - 1] - tie).all()


@pytest.mark.parametrize("bits", [24, 64, 128])
def test_hashes_pick_what_faiss_finds_at_the_same_distances(head, faiss, bits):
    """Small integers, so that no sign depends on rounding; distances of three query heads are added up."""
    rng = np.random.default_rng(bits)
    keys, q = (rng.integers(-8, 9, (n, DIM)).astype(F32) for n in (1024, 3))
    weights = rng.integers(-8, 9, (1, DIM, bits)).astype(F32)
    s = store_of(keys[None], np.zeros((1, 1024, 1), F32))
    codes, of_queries = (np.packbits(x @ weights[0] > 0, axis=1) for x in (keys, q))
    index = faiss.IndexBinaryFlat(bits)
    index.add(codes)
    apart, rows = index.search(of_queries, 1024)
    distances = np.empty((3, 1024), np.int64)
    np.put_along_axis(distances, rows, apart, axis=1)
    hashes = la.index.Hashes(s, weights)
    # A scale of 1 keeps the queries' products integers, too.
    call = {"sinks": 0, "window": 0, "top_k": K, "scale": 1.0, "return_selected": True}
    for heads in ([0], [1], [0, 1, 2]):
        total = distances[heads].sum(axis=0)
        selected = la.retrieval_attention(q[heads, None], s, hashes, **call).stats.selected[0][0]
        np.testing.assert_array_equal(np.sort(total[selected]), np.sort(total)[:K])


@pytest.mark.parametrize(("bits", "least"), [(1, 0.5), (2, 0.7), (4, 0.9)])
def test_signatures_rank_as_well_as_rabitq_of_faiss(head, store, faiss, bits, least):
    keys, _, q, _ = head
    # Ours turns keys at random, too, and knows their mean.
    index = faiss.IndexPreTransform(
        faiss.RandomRotationMatrix(DIM, DIM), faiss.IndexRaBitQ(DIM, faiss.METRIC_INNER_PRODUCT, bits)
    )
    index.train(keys)
    index.add(keys)
    best = best_rows(keys, q)
    theirs = recall(index.search(q, K)[1], best)
    check_no_worse(recall(picked(store, la.index.Signatures(store, bits), q), best), theirs, least)


@pytest.mark.parametrize(("subvectors", "bits", "least"), [(4, 4, 0.2), (8, 4, 0.4), (16, 4, 0.6), (8, 8, 0.7)])
def test_product_codes_rank_as_well_as_those_of_faiss(head, store, faiss, subvectors, bits, least):
    keys, _, q, _ = head
    index = faiss.IndexPQ(DIM, subvectors, bits, faiss.METRIC_INNER_PRODUCT)
    index.pq.cp.min_points_per_centroid = 1  # no warning that 4096 keys are few
    index.train(keys)
    index.add(keys)
    best = best_rows(keys, q)
    ours = picked(store, la.index.ProductQuantisation(store, subvectors, bits), q)
    check_no_worse(recall(ours, best), recall(index.search(q, K)[1], best), least)


@pytest.mark.parametrize(("nprobe", "least"), [(2, 0.3), (8, 0.7), (32, 0.97)])
def test_inverted_lists_find_as_much_as_those_of_faiss(head, store, faiss, nprobe, least):
    keys, _, q, _ = head
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(DIM), DIM, 32, faiss.METRIC_INNER_PRODUCT)
    index.train(keys)
    index.add(keys)
    index.nprobe = nprobe
    best = best_rows(keys, q)
    ours = picked(store, la.index.InvertedLists(store, lists=32, nprobe=nprobe), q)
    check_no_worse(recall(ours, best), recall(index.search(q, K)[1], best), least)


@pytest.mark.parametrize("nprobe", [4, 16])
def test_clusters_read_as_many_of_the_best_rows_as_lists_of_faiss(head, store, faiss, nprobe):
    """Both have clusters of 64 rows on average, rank them by their centroids, and read the same number of rows."""
    keys, _, q, _ = head
    lists = ROWS // 64
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(DIM), DIM, lists, faiss.METRIC_INNER_PRODUCT)
    index.train(keys)
    index.add(keys)
    index.nprobe = nprobe
    best = best_rows(keys, q)
    _, near = index.quantizer.search(q, nprobe)
    read = sum(index.invlists.list_size(int(i)) for i in near.ravel()) // QUERIES
    clusters = la.index.Clusters(store, segment=ROWS, keys_per_cluster=64, score="mean")
    ours = picked(store, clusters, q, top_k=read)
    assert np.mean([len(rows) for rows in ours]) <= read
    check_no_worse(recall(ours, best), recall(index.search(q, K)[1], best), 0.4)


def faiss_graph(keys, links, breadth):
    """A search of a hierarchical graph."""
    library = _faiss()
    index = library.IndexHNSWFlat(DIM, links, library.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = breadth
    index.add(keys)

    def search(q, ef):
        index.hnsw.efSearch = ef
        return index.search(q, K)[1]

    return search


def hnswlib_graph(keys, links, breadth):
    """A search of a hierarchical graph."""
    library = pytest.importorskip("hnswlib")
    index = library.Index("ip", DIM)
    index.init_index(len(keys), ef_construction=breadth, M=links, random_seed=1)
    index.set_num_threads(1)
    index.add_items(keys)

    def search(q, ef):
        index.set_ef(ef)
        return index.knn_query(q, K, num_threads=1)[0].astype(np.int64)

    return search


def usearch_graph(keys, links, breadth):
    """A search of a hierarchical graph."""
    library = pytest.importorskip("usearch.index")
    index = library.Index(ndim=DIM, metric="ip", dtype="f32", connectivity=links, expansion_add=breadth)
    index.add(np.arange(len(keys)), keys, threads=1)

    def search(q, ef):
        index.expansion_search = ef
        return [index.search(row, K, threads=1).keys.astype(np.int64) for row in q]

    return search


@pytest.mark.parametrize("made", [faiss_graph, hnswlib_graph, usearch_graph])
@pytest.mark.parametrize("trained", [False, True])
def test_graphs_find_as_much_as_other_graphs(head, store, made, trained):
    """At the same width of the searches; links as many as a hierarchical graph has on its lowest level."""
    keys, _, q, sample = head
    search = made(keys, 32, 100)
    best = best_rows(keys, q)
    for ef, least in ((K, 0.6), (200, 0.9)):
        graph = la.index.Graph(store, sample[None] if trained else None, beam=100, max_degree=64, ef=ef)
        check_no_worse(recall(picked(store, graph, q), best), recall(search(q, ef), best), least)
