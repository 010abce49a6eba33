"""Finding the keys of a query beside faiss, hnswlib and usearch, the libraries that people use for it, on a CPU.

python benches/peers/ann.py --json ann.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from longattn.bench import nearest
from longattn.bench.nearest import BEST, Peer, Search

COUNTS = (BEST, 4 * BEST)
LINKS, BREADTH = 32, 200  # per row, and while building, in all graphs
EFFORTS = (100, 200, 400, 800, 1600)


def load() -> tuple[dict[str, str], Sequence[Peer]]:
    """Versions, and the indexes."""
    try:
        import faiss
        import hnswlib  # noqa: F401
        import usearch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install faiss-cpu hnswlib usearch", name=error.name
        ) from error
    versions = {"faiss": faiss.__version__, "usearch": usearch.__version__, "hnswlib": metadata.version("hnswlib")}
    return versions, (
        Peer("faiss flat", flat),
        Peer("faiss IVF", inverted_lists),
        Peer("faiss binary flat", binary),
        Peer("faiss HNSW", faiss_graph),
        Peer("hnswlib", hnswlib_graph),
        Peer("usearch", usearch_graph),
    )


def swept(
    efforts: Sequence[int], unit: str, find: Callable[[np.ndarray, int, int], Any], *, at_least_k: bool
) -> list[Search]:
    """Every effort with both counts of neighbours; graphs look at `k` candidates at least."""
    return [
        Search(f"{k} of {unit} {effort}", lambda q, k=k, effort=effort: find(q[None], k, effort))
        for k in COUNTS
        for effort in efforts
        if effort >= k or not at_least_k
    ]


def one_thread(call: Callable[[], Any]) -> Any:
    """Faiss has one setting of threads for the process, which building changes."""
    import faiss

    faiss.omp_set_num_threads(1)
    return call()


def flat(keys: np.ndarray, threads: int) -> list[Search]:
    """Every key is scored."""
    import faiss

    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys)
    return [Search(f"{k}", lambda q, k=k: one_thread(lambda: index.search(q[None], k))[1][0]) for k in COUNTS]


def inverted_lists(keys: np.ndarray, threads: int) -> list[Search]:
    """k-means, and the lists of the centroids with the largest product."""
    import faiss

    faiss.omp_set_num_threads(threads)
    lists = min(1024, max(16, len(keys) // 128))
    index = faiss.index_factory(keys.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(keys)
    index.add(keys)

    def find(q: np.ndarray, k: int, probes: int) -> Any:
        index.nprobe = probes
        return one_thread(lambda: index.search(q, k))[1][0]

    return swept((4, 8, 16, 32, 64, 128), "nprobe", find, at_least_k=False)


def binary(keys: np.ndarray, threads: int) -> list[Search]:
    """Signs of the keys less their mean, all compared; the candidates nearest are ranked by their products."""
    import faiss

    mean = keys.mean(0)
    index = faiss.IndexBinaryFlat(-(-keys.shape[1] // 8) * 8)
    index.add(np.packbits(keys > mean, axis=1))

    def find(q: np.ndarray, k: int, candidates: int) -> Any:
        rows = one_thread(lambda: index.search(np.packbits(q > 0, axis=1), candidates))[1][0]
        rows = rows[rows >= 0]
        if k >= len(rows):
            return rows
        return rows[np.argpartition(keys[rows] @ q[0], -k)[-k:]]

    return swept((400, 1600, 6400), "candidates", find, at_least_k=True)


def faiss_graph(keys: np.ndarray, threads: int) -> list[Search]:
    """A hierarchical graph."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexHNSWFlat(keys.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BREADTH
    index.add(keys)

    def find(q: np.ndarray, k: int, effort: int) -> Any:
        index.hnsw.efSearch = effort
        return one_thread(lambda: index.search(q, k))[1][0]

    return swept(EFFORTS, "ef", find, at_least_k=True)


def hnswlib_graph(keys: np.ndarray, threads: int) -> list[Search]:
    """A hierarchical graph."""
    import hnswlib

    index = hnswlib.Index("ip", keys.shape[1])
    index.init_index(len(keys), ef_construction=BREADTH, M=LINKS)
    index.set_num_threads(threads)
    index.add_items(keys)
    index.set_num_threads(1)

    def find(q: np.ndarray, k: int, effort: int) -> Any:
        index.set_ef(effort)
        return index.knn_query(q, k, num_threads=1)[0][0].astype(np.int64)

    return swept(EFFORTS, "ef", find, at_least_k=True)


def usearch_graph(keys: np.ndarray, threads: int) -> list[Search]:
    """A hierarchical graph."""
    from usearch.index import Index

    index = Index(ndim=keys.shape[1], metric="ip", dtype="f32", connectivity=LINKS, expansion_add=BREADTH)
    index.add(np.arange(len(keys)), keys, threads=threads)

    def find(q: np.ndarray, k: int, effort: int) -> Any:
        index.expansion_search = effort
        return np.asarray(index.search(q[0], k, threads=1).keys).astype(np.int64)

    return swept(EFFORTS, "expansion", find, at_least_k=True)


if __name__ == "__main__":
    sys.exit(nearest.main("ann", load))
