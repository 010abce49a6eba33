"""Indexes by the name of their kind, for settings that are data: configurations, command lines, comparisons."""

from __future__ import annotations

import inspect
from typing import Any

from longattn._arrays import Array
from longattn._checks import one_of
from longattn.index._index import Index
from longattn.index.clusters import Clusters
from longattn.index.collisions import Collisions
from longattn.index.features import Features
from longattn.index.flat import Flat
from longattn.index.graph import Graph
from longattn.index.hashes import Hashes
from longattn.index.inverted_lists import InvertedLists
from longattn.index.lsh_tables import LshTables
from longattn.index.pages import Pages
from longattn.index.product_quantisation import ProductQuantisation
from longattn.index.signatures import Signatures
from longattn.kv import KVStore

#: Every kind of index by its name. `features` needs the weights of an encoder among its parameters.
KINDS: dict[str, type[Index]] = {
    kind.KIND: kind
    for kind in (
        Signatures,
        ProductQuantisation,
        Pages,
        Clusters,
        Flat,
        InvertedLists,
        Graph,
        Hashes,
        LshTables,
        Collisions,
        Features,
    )
}

#: Kinds that weigh every row by itself, as `rest="sampled"` and `epsilon` of `retrieval_attention` need.
WEIGH_ROWS = frozenset({Signatures.KIND})


def make(kind: str, store: KVStore, *, queries: Array | None = None, **parameters: Any) -> Index:
    """An index of a kind given by its name.

    Args:
        kind: one of `KINDS`.
        store: the store to index.
        queries: queries of the prefill, `[Hq, n, D]`, for the kinds that learn from them; the others do without.
        parameters: the kind's own arguments.

    Raises:
        TypeError: a parameter that the kind does not have, or one that it needs and that is not given.
        ValueError: an unknown kind, or what the kind refuses.

    Example:
        index = la.index.make("signatures", store, bits=2)
    """
    check(kind, parameters)
    if queries is not None and "queries" in inspect.signature(KINDS[kind]).parameters:
        parameters["queries"] = queries
    constructor: Any = KINDS[kind]
    index: Index = constructor(store, **parameters)
    return index


def check(kind: str, parameters: dict[str, Any]) -> None:
    """Refuses an unknown kind, and parameters that it does not have."""
    one_of(kind, "kind", KINDS)
    known = list(inspect.signature(KINDS[kind]).parameters)[1:]  # the store comes first
    for name in parameters:
        if name not in known:
            raise TypeError(f"{name}: no parameter of an index of {kind}, which has {', '.join(known)}")
    for name in needed(kind):
        if name not in parameters:
            raise TypeError(f"{name}: got none, expected the parameter that an index of {kind} needs")


def needed(kind: str) -> list[str]:
    """Parameters without which no index of this kind can be made."""
    found = list(inspect.signature(KINDS[kind]).parameters.values())[1:]
    return [parameter.name for parameter in found if parameter.default is parameter.empty]


def learns_from_queries(kind: str) -> bool:
    """Whether an index of this kind may be given queries of the prefill."""
    return "queries" in inspect.signature(KINDS[kind]).parameters
