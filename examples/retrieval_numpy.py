"""One decode step over a long cache: exact attention beside retrieval attention.

    python examples/retrieval_numpy.py --length 65536 --top-k 512

Keys, values and queries are synthetic, but shaped like a model's: clustered keys with a large common offset
and queries distributed differently from the keys. Prints the time of a step, the share of rows read, the error
of the output, and the softmax mass that retrieval says it did not read. Needs numpy only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

import longattn as la
from longattn import vectors


def timed(call: Callable[[], Any], rounds: int = 5) -> tuple[float, Any]:
    """Median milliseconds of `rounds` calls, and what the last one returned."""
    milliseconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = call()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return statistics.median(milliseconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=65536, help="rows in the cache")
    parser.add_argument("--top-k", type=int, default=512, help="rows selected per KV head")
    arguments = parser.parse_args()

    data = vectors.load("synthetic", length=arguments.length, groups=1, heads=["0", "1"])
    queries = data.queries[0][:, None].astype(ml_dtypes.bfloat16)  # [query heads, 1, head_dim]
    store = la.KVStore(kv_heads=data.kv_heads, head_dim=data.head_dim, dtype="bfloat16", capacity=len(data))
    store.append(data.keys, data.values)

    index = la.index.Signatures(store, bits=4)
    start = time.perf_counter()
    index.update()  # retrieval_attention would do it at its first call
    print(f"store: {len(store)} rows, {store.nbytes / 2**20:.0f} MiB")
    print(f"index: {index.nbytes / 2**20:.0f} MiB, made in {time.perf_counter() - start:.2f} s")

    exact_ms, exact = timed(lambda: la.attention(queries, store.keys, store.values, causal=True))
    size = np.linalg.norm(exact.astype(np.float32))
    print(f"exact:     {exact_ms:7.2f} ms a step, reads every row")
    for name in ("values", "none"):
        ms, result = timed(
            lambda rest=name: la.retrieval_attention(queries, store, index, top_k=arguments.top_k, rest=rest)
        )
        error = np.linalg.norm(result.out.astype(np.float32) - exact.astype(np.float32)) / size
        stats = result.stats
        print(f"retrieval: {ms:7.2f} ms a step, reads {stats.fraction_attended:.2%} of the rows, rest={name!r}")
        print(f"           relative error of the output {error:.4f}")
        print(f"           softmax mass not read: {stats.missed_mass.mean():.3f} estimated, mean over the heads,")
        print(f"           at most {stats.missed_mass_bound.max():.3f} in the worst head")


if __name__ == "__main__":
    main()
