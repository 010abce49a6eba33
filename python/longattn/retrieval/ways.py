"""Named ways to read few rows of a store: indexes with the parameters that published methods give them.

`longattn compare` measures them beside each other, `longattn demo --ways` asks a model through them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from longattn._arrays import Array
from longattn.index import Index, by_name
from longattn.kv import KVStore


@dataclass(frozen=True)
class Way:
    """One way to pick rows.

    Attributes:
        name: what tables call it.
        kind: of index.
        parameters: of the index.
        queries: whether the index is given queries of the prefill.
        rest: whether its estimate of the rest takes part; `None` for wherever it has one.
    """

    name: str
    kind: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    queries: bool = False
    rest: Literal["values", "none"] | None = None

    def index(self, store: KVStore, queries: Array | None) -> Index:
        """Its index over a store; `queries` of the prefill, `[Hq, n, D]`, are used by the ways that learn from them."""
        return by_name.make(self.kind, store, queries=queries if self.queries else None, **self.parameters)


WAYS: tuple[Way, ...] = (
    Way("signatures, 4 bits", "signatures", {"bits": 4}),
    Way("signatures, 4 bits, rows only", "signatures", {"bits": 4}, rest="none"),
    Way("signatures, 2 bits", "signatures", {"bits": 2}),
    Way("signatures, 1 bit", "signatures", {"bits": 1}),
    Way("exact scan", "flat"),
    Way("inverted lists", "inverted_lists"),
    Way("graph around queries", "graph", queries=True),
    Way("graph of keys", "graph"),
    Way("product codes, 4 bits", "product_quantisation", {"bits": 4}),
    Way("product codes, 4 bits, by queries", "product_quantisation", {"bits": 4}, queries=True),
    Way("product codes, 8 bits", "product_quantisation", {"bits": 8}),
    Way("PQCache", "product_quantisation", {"bits": 8}, rest="none"),
    Way("pages of 16, means", "pages", {"page_size": 16, "score": "mean_variance"}),
    Way("Quest", "pages", {"page_size": 16, "score": "bounds"}),
    Way("clusters of 16", "clusters", {"keys_per_cluster": 16, "score": "mean_variance"}),
    Way("clusters of 64", "clusters", {"keys_per_cluster": 64, "score": "mean_variance"}),
    Way("RetroInfer", "clusters", {"keys_per_cluster": 16, "iterations": 10, "spherical": True}),
    Way("hashes, random", "hashes"),
    Way("hashes, learned", "hashes", queries=True),
    Way("hashes, random, by norm", "hashes", {"use_norm": True}),
    Way("LSH tables, sampled", "lsh"),
    Way("collisions", "collisions"),
)


def chosen(parts: str) -> Sequence[Way]:
    """The ways whose names contain one of the comma-separated `parts`; all of them for `"all"`.

    Raises:
        ValueError: there is none.
    """
    found = WAYS if parts == "all" else [way for way in WAYS if any(part in way.name for part in parts.split(","))]
    if not found:
        raise ValueError(f"ways: got {parts!r}, expected part of one of {'; '.join(way.name for way in WAYS)}")
    return found
