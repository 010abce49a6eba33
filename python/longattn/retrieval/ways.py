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
