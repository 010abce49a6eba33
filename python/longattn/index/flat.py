"""`Flat`: no index, every key is scored."""

from __future__ import annotations

from typing import ClassVar

from longattn import _core
from longattn.index._index import Index, check_store
from longattn.kv import KVStore


class Flat(Index):
    """The exact scan: every candidate's logit, over the store's own rows.

    What other indexes are measured by: it picks the best rows there are, by the mean over the query group of each
    row's share of the softmax, ties to the lower row. `top_p` is of the exact mass, and `missed_mass` and its bound
    are what the rows left unread really hold. Their values are not read, so there is no estimate of the rest:
    `estimates` is False and `rest` must be `"none"`; an exact one would be dense attention.

    Args:
        store: the store to scan; it is kept alive.

    Raises:
        TypeError: an argument of another kind, or a store of codes.

    Cost:
        No memory. Each step reads all keys once per KV head for the whole query group. Rows are looked at once when
        they are appended, so that a key that is not finite is refused as other indexes refuse it.
    """

    __slots__ = ()

    KIND: ClassVar[str] = "flat"

    def __init__(self, store: KVStore) -> None:
        check_store(store)
        self._set(_core.flat(store._handle), store)
